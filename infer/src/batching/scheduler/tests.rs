//! Whatever the cache, the neighbours and the order: what a job gives is what it gives alone.

use super::*;
use crate::engine::{Engine, tests::tiny};
use crate::sampler::SamplingOptions;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const VOCAB: usize = 96;
const CONTEXT: usize = 1500;

fn text(n: usize, salt: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 17 + salt * 5 + i * i % 7) % VOCAB) as u32).collect()
}

fn settings(rows: usize, cache_bytes: u64, exact_cache: bool) -> SchedulerSettings {
    let batch = BatchSettings { prefill_tokens: 128, ..BatchSettings::new(rows, CONTEXT) };
    SchedulerSettings { exact_cache, stride: 256, ..SchedulerSettings::new(batch, cache_bytes) }
}

fn choice(seed: u64, temperature: f32) -> Choice {
    let options = SamplingOptions { temperature, top_p: 1.0, seed: Some(seed), ..SamplingOptions::default() };
    Choice { sampler: Sampler::new(options, None).unwrap(), guide: None }
}

fn job(prompt: Vec<u32>, turns: Vec<usize>, choices: Vec<Choice>, max_new: usize) -> Job {
    let (end_ids, max_new) = (Arc::default(), Some(max_new));
    Job { prompt, turns, choices, end_ids, max_new, top_log_probs: 0, score_prompt: false }
}

/// What came of a job: ids with the bits of their log-probabilities by choice, and the tokens that were cached.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    drawn: Vec<Vec<(u32, u32)>>,
    cached: usize,
    ended: usize,
}

impl Outcome {
    fn take(&mut self, update: Update) {
        match update {
            Update::Read { cached } => self.cached = cached,
            Update::Drawn { choice, token, .. } => {
                self.drawn.resize(self.drawn.len().max(choice + 1), Vec::new());
                self.drawn[choice].push((token.id, token.log_prob.to_bits()));
            }
            Update::Finished { .. } => self.ended += 1,
            Update::Failed(error) => panic!("{error}"),
            Update::Scored(_) => panic!("nobody asked"),
        }
    }

    fn ids(&self, choice: usize) -> Vec<u32> {
        self.drawn[choice].iter().map(|d| d.0).collect()
    }
}

fn run(scheduler: &mut Scheduler, job: Job) -> Outcome {
    let id = scheduler.submit(job).unwrap();
    let mut outcome = Outcome::default();
    while !scheduler.is_idle() {
        for (of, update) in scheduler.step().unwrap() {
            assert_eq!(of, id);
            outcome.take(update);
        }
    }
    outcome
}

/// The job in a scheduler of its own, without a cache.
fn alone(engine: &Engine, job: Job) -> Outcome {
    run(&mut Scheduler::new(engine.model(), settings(1, 0, true)), job)
}

#[test]
fn marks_are_sparse() {
    assert_eq!(marks(&[], 66, 4096), [64]);
    assert_eq!(marks(&[10, 130, 260, 300], 300, 4096), [128, 256, 256]);
    assert_eq!(marks(&[70, 200, 400], 500, 256), [192, 384, 448, 256]);
    assert_eq!(marks(&[], 1, 4096), [0]);
}

/// Answers of one job share the reading of the prompt, and each is what it would be alone.
#[test]
fn several_answers_are_those_of_as_many_jobs() {
    let engine = tiny(VOCAB, CONTEXT);
    for rows in [1, 2, 8] {
        let mut scheduler = Scheduler::new(engine.model(), settings(rows, 0, true));
        let all = run(&mut scheduler, job(text(150, 1), vec![], (0..5).map(|i| choice(i, 1.2)).collect(), 9));
        assert_eq!((all.ended, all.drawn.len()), (5, 5));
        for i in 0..5 {
            let one = alone(&engine, job(text(150, 1), vec![], vec![choice(i as u64, 1.2)], 9));
            assert_eq!(all.drawn[i], one.drawn[0], "answer {i}, {rows} rows");
        }
    }
}

/// Conversations that branch, go on and are edited in the middle: with the exact cache every bit is that of a fresh
/// start, and otherwise the greedy text is; and what should be found is.
#[test]
fn conversations_go_on_from_what_was_read() {
    let engine = tiny(VOCAB, CONTEXT);
    for exact in [true, false] {
        let mut scheduler = Scheduler::new(engine.model(), settings(4, 1 << 30, exact));
        let mut past = text(330, 7);
        for turn in 0..4 {
            let ask = || job(past.clone(), vec![past.len() - 20], vec![choice(1, 0.0)], 12);
            let (got, wanted) = (run(&mut scheduler, ask()), alone(&engine, ask()));
            assert_eq!(got.ids(0), wanted.ids(0), "turn {turn}");
            if exact {
                assert_eq!(got.drawn, wanted.drawn, "turn {turn}");
            }
            if turn > 0 {
                // The reply's last id was never read.
                let before = past.len() - 30;
                let least = if exact { cut_before(before - 12, before - 12) } else { before - 1 };
                assert_eq!(got.cached, least, "turn {turn}");
            }
            past = [past, got.ids(0), text(30, turn)].concat();
        }
        // Asked again: the snapshot before the last tokens.
        let again = run(&mut scheduler, job(past[..past.len() - 30].to_vec(), vec![], vec![choice(1, 0.0)], 3));
        assert!(past.len() - 30 - again.cached <= 66, "{}", again.cached);
        // An edit of the first text, beyond its 256th token.
        let edited = [&past[..270], &text(100, 9)[..]].concat();
        let ask = || job(edited.clone(), vec![], vec![choice(1, 0.0)], 5);
        let (got, wanted) = (run(&mut scheduler, ask()), alone(&engine, ask()));
        assert_eq!((got.cached, got.drawn), (256, wanted.drawn));
    }
}

/// Jobs of every kind come at any step, branch from one another, are cancelled, and press on a cache that holds a
/// few of them: nothing wrong is ever said.
#[test]
fn under_pressure_nothing_wrong_is_said() {
    let engine = tiny(VOCAB, CONTEXT);
    let one = {
        let mut scheduler = Scheduler::new(engine.model(), settings(1, 1 << 30, true));
        run(&mut scheduler, job(text(300, 1), vec![], vec![choice(1, 0.0)], 2));
        scheduler.cache().bytes / scheduler.cache().entries as u64
    };
    for exact in [true, false] {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut scheduler = Scheduler::new(engine.model(), settings(3, 5 * one, exact));
        let mut texts: Vec<Vec<u32>> = (0..3).map(|i| text(100 + 90 * i, i)).collect();
        let mut open: HashMap<JobId, (Vec<u32>, Outcome)> = HashMap::new();
        let (mut checked, mut cancelled, mut hits) = (0, 0, 0);
        for step in 0..400 {
            if step < 300 && rng.random_bool(0.2) {
                let from = &texts[rng.random_range(0..texts.len())];
                let kept = if rng.random_bool(0.3) { rng.random_range(1..=from.len()) } else { from.len() };
                let more = text(rng.random_range(0..90), rng.random_range(0..1000));
                let prompt: Vec<u32> = [&from[..kept], &more].concat();
                let prompt = prompt[..prompt.len().min(CONTEXT - 20)].to_vec();
                let id = scheduler
                    .submit(job(prompt.clone(), vec![kept], vec![choice(0, 0.0)], rng.random_range(1..12)))
                    .unwrap();
                open.insert(id, (prompt, Outcome::default()));
            }
            if rng.random_bool(0.03)
                && let Some(&id) = open.keys().min()
            {
                scheduler.cancel(id);
                open.remove(&id);
                cancelled += 1;
            }
            for (id, update) in scheduler.step().unwrap() {
                let (prompt, outcome) = open.get_mut(&id).expect("nothing is told of a cancelled job");
                outcome.take(update);
                if outcome.ended == 0 {
                    continue;
                }
                let wanted = alone(&engine, job(prompt.clone(), vec![], vec![choice(0, 0.0)], outcome.drawn[0].len()));
                assert_eq!(outcome.ids(0), wanted.ids(0));
                if exact {
                    assert_eq!(outcome.drawn, wanted.drawn);
                }
                for (got, wanted) in outcome.drawn[0].iter().zip(&wanted.drawn[0]) {
                    assert!((f32::from_bits(got.1) - f32::from_bits(wanted.1)).abs() < 1e-4);
                }
                hits += usize::from(outcome.cached > 0);
                checked += 1;
                let (prompt, outcome) = open.remove(&id).unwrap();
                texts.push([prompt, outcome.ids(0)].concat());
            }
            assert!(scheduler.cache().bytes <= 5 * one);
        }
        assert!(scheduler.is_idle() && open.is_empty());
        assert_eq!(scheduler.bytes(), 0);
        let evictions = scheduler.cache().evictions;
        assert!(
            checked > 40 && cancelled > 3 && hits > 15 && evictions > 15,
            "{checked} {cancelled} {hits} {evictions}"
        );
    }
}

/// What was read of a cancelled job is where the next one begins.
#[test]
fn a_stopped_reply_is_gone_on_from() {
    let engine = tiny(VOCAB, CONTEXT);
    for exact in [true, false] {
        let mut scheduler = Scheduler::new(engine.model(), settings(2, 1 << 30, exact));
        let prompt = text(200, 3);
        let id = scheduler.submit(job(prompt.clone(), vec![], vec![choice(1, 0.0)], 50)).unwrap();
        let mut outcome = Outcome::default();
        (0..6).flat_map(|_| scheduler.step().unwrap()).for_each(|(_, update)| outcome.take(update));
        scheduler.cancel(id);
        assert_eq!((scheduler.is_idle(), scheduler.step().unwrap()), (true, vec![]));
        let next = [&prompt[..], &outcome.ids(0), &[5, 6, 7]].concat();
        let ask = || job(next.clone(), vec![], vec![choice(1, 0.0)], 4);
        let (got, wanted) = (run(&mut scheduler, ask()), alone(&engine, ask()));
        assert_eq!(got.ids(0), wanted.ids(0));
        assert_eq!(got.cached, if exact { 192 } else { prompt.len() + outcome.drawn[0].len() - 1 });
        // One that is stopped while its prompt is read leaves the pieces that were read.
        let long = text(1000, 11);
        let id = scheduler.submit(job(long.clone(), vec![], vec![choice(1, 0.0)], 5)).unwrap();
        (0..3).for_each(|_| assert_eq!(scheduler.step().unwrap(), vec![]));
        scheduler.cancel(id);
        let ask = || job(long.clone(), vec![], vec![choice(1, 0.0)], 5);
        let (got, wanted) = (run(&mut scheduler, ask()), alone(&engine, ask()));
        assert_eq!((got.cached, got.drawn), (384, wanted.drawn));
    }
}

/// A reply without a limit gets its row's share of the memory, so that others fit beside it; one that says how much it
/// wants is held to it, and refused if that is more than there is.
#[test]
fn replies_without_a_limit_share_the_memory() {
    const CONTEXT: usize = 2500;
    let engine = tiny(VOCAB, CONTEXT);
    let mut limited = settings(2, 0, true);
    limited.batch.context = CONTEXT;
    let free = Scheduler::new(engine.model(), limited);
    let row =
        |tokens| free.batcher.needed(&Request::new(text(tokens, 1), choice(1, 0.0).sampler, Arc::default(), Some(0)));
    assert_eq!((free.batcher.longest_in(row(256)), free.batcher.longest_in(row(256) - 1)), (256, 0));
    assert_eq!((free.batcher.longest_in(u64::MAX), free.room(10)), (CONTEXT, None));
    limited.batch.memory = Some(2 * row(2000));
    let mut scheduler = Scheduler::new(engine.model(), limited);
    let unlimited = |n| Job { max_new: None, ..job(text(n, 1), vec![], vec![choice(1, 0.0)], 0) };
    let jobs = [0, 1].map(|_| scheduler.submit(unlimited(2200)).unwrap());
    let mut drawn = [0, 0];
    let mut most = 0;
    while !scheduler.is_idle() {
        for (id, update) in scheduler.step().unwrap() {
            let job = jobs.iter().position(|&job| job == id).unwrap();
            drawn[job] += usize::from(matches!(update, Update::Drawn { .. }));
        }
        most = most.max(scheduler.active());
    }
    assert_eq!((most, drawn), (1, [300, 300]), "what little a long prompt may say goes beyond the share");
    let jobs = [0, 1].map(|_| scheduler.submit(unlimited(10)).unwrap());
    scheduler.step().unwrap();
    assert_eq!(scheduler.active(), 2);
    jobs.into_iter().for_each(|job| scheduler.cancel(job));

    limited.batch.memory = Some(row(256));
    let mut scheduler = Scheduler::new(engine.model(), limited);
    assert!(scheduler.submit(unlimited(250)).is_ok());
    assert!(matches!(scheduler.submit(unlimited(256)), Err(EngineError::Memory { .. })));
    let asked = job(text(40, 1), vec![], vec![choice(1, 0.0)], 1000);
    assert!(matches!(scheduler.submit(asked), Err(EngineError::Memory { .. })));
}

#[test]
fn what_cannot_run_is_refused_or_fails_alone() {
    let engine = tiny(VOCAB, CONTEXT);
    let mut scheduler = Scheduler::new(engine.model(), settings(2, 0, false));
    assert_eq!(scheduler.submit(job(text(5, 1), vec![], vec![], 1)), Err(EngineError::Empty));
    assert_eq!(scheduler.submit(job(vec![], vec![], vec![choice(1, 1.0)], 1)), Err(EngineError::Empty));
    let nothing = Sampler::new(SamplingOptions::default(), Some(vec![false; VOCAB])).unwrap();
    let bad = Choice { sampler: nothing, guide: None };
    let fails = scheduler.submit(job(text(5, 1), vec![], vec![choice(1, 1.0), bad, choice(2, 1.0)], 20)).unwrap();
    let works = scheduler.submit(job(text(6, 1), vec![], vec![choice(1, 1.0)], 3)).unwrap();
    let (mut failed, mut ended) = (0, 0);
    while !scheduler.is_idle() {
        for (id, update) in scheduler.step().unwrap() {
            match update {
                Update::Failed(error) => {
                    assert!(id == fails && matches!(error, EngineError::Sampler(_)));
                    failed += 1;
                }
                Update::Finished { .. } => {
                    assert_eq!(id, works);
                    ended += 1;
                }
                _ => assert!(failed == 0 || id == works, "nothing comes of a job that failed"),
            }
        }
    }
    assert_eq!((failed, ended), (1, 1));
    assert!(scheduler.jobs.is_empty() && scheduler.owners.is_empty());
}
