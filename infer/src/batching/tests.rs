//! What a sequence gives in a batch is what it gives alone, to the bit.

use super::*;
use crate::engine::{Engine, tests::tiny};
use crate::sampler::SamplingOptions;
use std::collections::HashMap;

const VOCAB: usize = 96;
const CONTEXT: usize = 700;

fn text(n: usize, salt: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 17 + salt * 5 + i * i % 7) % VOCAB) as u32).collect()
}

/// How the requests of the tests differ, by number.
fn request(i: usize, prompt: Vec<u32>, prefix: Option<Arc<Prefix>>) -> Request {
    let plain = SamplingOptions { top_p: 1.0, seed: Some(i as u64), ..SamplingOptions::default() };
    let options = match i % 4 {
        0 => plain,
        1 => SamplingOptions { temperature: 0.0, repetition_penalty: 1.3, ..plain },
        2 => SamplingOptions { temperature: 1.7, top_k: 20, ..plain },
        _ => SamplingOptions { top_p: 0.9, min_p: 0.01, ..plain },
    };
    Request {
        prompt,
        prefix,
        sampler: Sampler::new(options, None).unwrap(),
        end_ids: if i.is_multiple_of(3) { (0..6).collect() } else { Arc::default() },
        max_new: if i % 5 == 4 { None } else { Some(1 + i * 7 % 23) },
        keep: false,
    }
}

/// Ids with the bits of their log-probabilities, and why they ended.
type Outcome = (Vec<(u32, u32)>, Option<Finish>);

/// The request alone, in a session that reads what its prefix holds first.
fn alone(engine: &Engine, request: &Request) -> Outcome {
    let mut session = engine.session();
    if let Some(prefix) = &request.prefix {
        session.read(prefix.tokens(), &mut |_, _| true).unwrap();
    }
    session.read(&request.prompt, &mut |_, _| true).unwrap();
    let (mut sampler, mut drawn) = (request.sampler.clone(), Vec::new());
    // Sessions keep the end id to themselves: here it is told from the others afterwards.
    let mut ended = None;
    let finish = session.generate(&mut sampler, &[], request.max_new, &mut |token| {
        drawn.push((token.id, token.log_prob.to_bits()));
        ended = request.end_ids.contains(&token.id).then_some(Finish::End(token.id));
        ended.is_none()
    });
    (drawn, Some(ended.unwrap_or(finish.unwrap())))
}

#[derive(Default)]
struct Seen {
    results: HashMap<RequestId, Outcome>,
    prefixes: HashMap<RequestId, Arc<Prefix>>,
}

impl Seen {
    fn step(&mut self, batcher: &mut Batcher) {
        for event in batcher.step().unwrap() {
            match event {
                Event::Read { id, prefix } => assert!(self.prefixes.insert(id, prefix).is_none()),
                Event::Drawn { id, token } => {
                    let result = self.results.entry(id).or_default();
                    assert_eq!(result.1, None, "nothing comes after the end");
                    result.0.push((token.id, token.log_prob.to_bits()));
                }
                Event::Finished { id, finish } => {
                    assert_eq!(self.results.entry(id).or_default().1.replace(finish), None);
                }
                Event::Failed { id, error } => panic!("{id:?}: {error}"),
            }
        }
    }
}

fn settings(rows: usize, prefill_tokens: usize) -> BatchSettings {
    BatchSettings { rows, prefill_tokens, context: CONTEXT }
}

/// Prompts around every border there is: one token, blocks of 64 and 256, pieces of 512, the end of the context.
const LENGTHS: [usize; 14] = [1, 40, 513, 2, 63, 64, 65, 129, 690, 256, 257, 1, 577, 30];

#[test]
fn a_row_of_a_refilling_batch_gives_the_bits_of_the_row_alone() {
    let plain = tiny(VOCAB, CONTEXT);
    let packed = Engine::new(plain.model().packed().unwrap(), Some(CONTEXT));
    for engine in [&plain, &packed] {
        let requests: Vec<Request> = LENGTHS.iter().enumerate().map(|(i, &n)| request(i, text(n, i), None)).collect();
        let wanted: Vec<Outcome> = requests.iter().map(|r| alone(engine, r)).collect();
        let ends = |finish: fn(&Finish) -> bool| wanted.iter().filter(|w| finish(&w.1.unwrap())).count();
        let [end, length, context] =
            [ends(|f| matches!(f, Finish::End(_))), ends(|f| *f == Finish::Length), ends(|f| *f == Finish::Context)];
        assert!(end > 0 && length > 0 && context > 0, "{end} {length} {context}: the test covers every end");
        for (rows, budget) in [(1, 512), (3, 16), (3, 512), (5, 200), (64, 512)] {
            let mut batcher = Batcher::new(engine.model(), settings(rows, budget));
            let (mut seen, mut ids) = (Seen::default(), Vec::new());
            // Some are there from the start, the others come while the first are under way.
            let mut coming = requests.iter();
            ids.extend(coming.by_ref().take(6).map(|r| batcher.admit(r.clone()).unwrap()));
            let mut most = 0;
            while !batcher.is_idle() {
                seen.step(&mut batcher);
                ids.extend(coming.by_ref().take(1).map(|r| batcher.admit(r.clone()).unwrap()));
                most = most.max(batcher.active());
                assert!(batcher.active() <= rows);
            }
            assert!(most >= rows.min(5), "{most} of {rows} rows were in use");
            for (i, id) in ids.iter().enumerate() {
                assert_eq!(seen.results[id], wanted[i], "prompt of {} tokens, {rows} rows, {budget}", LENGTHS[i]);
            }
            assert_eq!(ids.len(), LENGTHS.len());
            assert_eq!(batcher.bytes(), 0, "an idle batcher holds nothing");
        }
    }
}

#[test]
fn a_prefix_is_read_once_and_changes_nothing() {
    let engine = tiny(VOCAB, CONTEXT);
    let (shared, mut batcher) = (text(130, 1), Batcher::new(engine.model(), settings(4, 64)));
    let mut seen = Seen::default();
    let first = batcher.admit(Request { keep: true, max_new: Some(0), ..request(0, shared.clone(), None) }).unwrap();
    while !batcher.is_idle() {
        seen.step(&mut batcher);
    }
    assert_eq!(seen.results[&first], (Vec::new(), Some(Finish::Length)));
    let prefix = seen.prefixes[&first].clone();
    let mut session = engine.session();
    session.read(&shared, &mut |_, _| true).unwrap();
    assert_eq!((prefix.tokens(), &prefix.logits[..]), (&shared[..], session.logits()));

    // All of the prompt is known, or all but one token, or but many; and one that is kept on the way.
    let mut requests: Vec<Request> = (0..12)
        .map(|i| request(i, [&shared[..], &text([0, 1, 2, 90][i % 4], i)[..]].concat(), Some(prefix.clone())))
        .collect();
    requests[1].keep = true;
    requests[4].keep = true;
    for budget in [64, 512] {
        let mut batcher = Batcher::new(engine.model(), settings(4, budget));
        let mut seen = Seen::default();
        let ids: Vec<RequestId> = requests.iter().map(|r| batcher.admit(r.clone()).unwrap()).collect();
        while !batcher.is_idle() {
            seen.step(&mut batcher);
        }
        for ((request, id), i) in requests.iter().zip(&ids).zip(0..) {
            assert_eq!(seen.results[id], alone(&engine, request), "request {i}, {budget}");
            assert_eq!(seen.prefixes.contains_key(id), request.keep);
            if request.keep {
                session.read(&request.prompt, &mut |_, _| true).unwrap();
                assert_eq!(seen.prefixes[id].logits, session.logits());
            }
        }
    }
}

#[test]
fn a_long_prompt_does_not_hold_up_those_that_decode_nor_short_prompts() {
    let engine = tiny(VOCAB, CONTEXT);
    let mut batcher = Batcher::new(engine.model(), settings(4, 128));
    let with =
        |n: usize, max_new| Request { max_new: Some(max_new), end_ids: Arc::default(), ..request(0, text(n, n), None) };
    let quick = batcher.admit(with(10, 40)).unwrap();
    let mut seen = Seen::default();
    seen.step(&mut batcher);
    let long = batcher.admit(with(650, 1)).unwrap();
    let short = batcher.admit(with(20, 1)).unwrap();
    for step in 2..=6 {
        seen.step(&mut batcher);
        assert_eq!(seen.results[&quick].0.len(), step);
        assert!(!seen.results.contains_key(&long), "650 tokens take more than 5 pieces of 128");
        assert!(seen.results.contains_key(&short));
    }
    (0..2).for_each(|_| seen.step(&mut batcher));
    assert!(seen.results.contains_key(&long));
}

#[test]
fn a_cancelled_request_leaves_the_others_as_they_are() {
    let engine = tiny(VOCAB, CONTEXT);
    let requests: Vec<Request> = [20, 300, 30, 40, 600, 50, 64]
        .iter()
        .enumerate()
        .map(|(i, &n)| Request { max_new: Some(12), end_ids: Arc::default(), ..request(i, text(n, i), None) })
        .collect();
    let mut batcher = Batcher::new(engine.model(), settings(4, 64));
    let ids: Vec<RequestId> = requests.iter().map(|r| batcher.admit(r.clone()).unwrap()).collect();
    let mut seen = Seen::default();
    (0..3).for_each(|_| seen.step(&mut batcher));
    // One that decodes, one that reads, one that waits.
    for gone in [0, 1, 6] {
        assert!(batcher.cancel(ids[gone]));
        assert!(!batcher.cancel(ids[gone]));
    }
    let before = seen.results[&ids[0]].clone();
    while !batcher.is_idle() {
        seen.step(&mut batcher);
    }
    assert!(!batcher.cancel(ids[2]));
    assert_eq!(seen.results[&ids[0]], before);
    assert!(before.1.is_none() && !seen.results.contains_key(&ids[1]) && !seen.results.contains_key(&ids[6]));
    for i in [2, 3, 4, 5] {
        assert_eq!(seen.results[&ids[i]], alone(&engine, &requests[i]));
    }
}

#[test]
fn what_cannot_be_continued_is_refused_and_what_fails_fails_alone() {
    let engine = tiny(VOCAB, 24);
    let mut batcher = Batcher::new(engine.model(), BatchSettings::new(0, 24));
    let plain = |prompt| request(0, prompt, None);
    assert_eq!(batcher.admit(plain(vec![])), Err(EngineError::Empty));
    assert_eq!(batcher.admit(plain(vec![1, 96])), Err(EngineError::UnknownId { position: 1, id: 96, vocab: 96 }));
    assert_eq!(batcher.admit(plain(text(24, 1))), Err(EngineError::Context { tokens: 24, context: 24 }));
    let kept = batcher.admit(Request { keep: true, max_new: Some(0), ..plain(vec![5, 6, 7]) }).unwrap();
    let mut seen = Seen::default();
    seen.step(&mut batcher);
    let prefix = seen.prefixes[&kept].clone();
    let other = Request { prefix: Some(prefix), ..plain(vec![5, 6, 8, 9]) };
    assert_eq!(batcher.admit(other), Err(EngineError::Prefix { prefix: 3, tokens: 4 }));

    let nothing = Sampler::new(SamplingOptions::default(), Some(vec![false; VOCAB])).unwrap();
    let fails = batcher.admit(Request { sampler: nothing, ..plain(text(5, 2)) }).unwrap();
    let works = batcher.admit(plain(text(5, 2))).unwrap();
    let (mut failed, mut drawn) = (Vec::new(), Vec::new());
    while !batcher.is_idle() {
        for event in batcher.step().unwrap() {
            match event {
                Event::Failed { id, error: EngineError::Sampler(_) } => failed.push(id),
                Event::Drawn { id, .. } => drawn.push(id),
                Event::Finished { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(failed, [fails]);
    assert!(!drawn.is_empty() && drawn.iter().all(|&id| id == works));
}

/// The draws are spread over threads where there are many: the same ids come, whatever the threads.
#[test]
fn many_rows_of_a_large_vocabulary_draw_the_same_on_any_number_of_threads() {
    let engine = tiny(2048, CONTEXT);
    let run = |threads| {
        m1_kernels::base::pool::with_threads(threads, || {
            let mut batcher = Batcher::new(engine.model(), settings(20, 512));
            let mut seen = Seen::default();
            let ids: Vec<RequestId> =
                (0..24).map(|i| batcher.admit(request(i, text(5 + i, i), None)).unwrap()).collect();
            (0..6).for_each(|_| seen.step(&mut batcher));
            ids.iter().map(|id| seen.results.get(id).cloned().unwrap_or_default()).collect::<Vec<_>>()
        })
    };
    assert_eq!(run(1), run(3));
}
