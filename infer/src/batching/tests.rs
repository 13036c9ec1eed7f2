//! What a sequence gives in a batch is what it gives alone, to the bit.

use super::*;
use crate::engine::{Engine, tests::tiny, to_host};
use crate::sampler::{SamplingOptions, log_probs};
use m1_kernels::base::pool;
use m1_model::{Batch, Cache, Trace};
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
    let end_ids = if i.is_multiple_of(3) { (0..6).collect() } else { Arc::default() };
    let max_new = if i % 5 == 4 { None } else { Some(1 + i * 7 % 23) };
    Request { prefix, ..Request::new(prompt, Sampler::new(options, None).unwrap(), end_ids, max_new) }
}

/// The same request again.
fn again(request: &Request) -> Request {
    let Request { prompt, prefix, sampler, end_ids, max_new, keep, .. } = request;
    Request {
        prefix: prefix.clone(),
        keep: keep.clone(),
        ..Request::new(prompt.clone(), sampler.clone(), end_ids.clone(), *max_new)
    }
}

/// A request whose prompt is kept.
fn keeping() -> Keep {
    Keep { prompt: true, ..Keep::default() }
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
    passed: HashMap<RequestId, Vec<Snapshot>>,
    scores: HashMap<RequestId, Vec<Scored>>,
}

impl Seen {
    fn step(&mut self, batcher: &mut Batcher) {
        for event in batcher.step().unwrap() {
            match event {
                Event::Read { id, prefix } => assert!(self.prefixes.insert(id, prefix).is_none()),
                Event::Drawn { id, token, .. } => {
                    let result = self.results.entry(id).or_default();
                    assert_eq!(result.1, None, "nothing comes after the end");
                    result.0.push((token.id, token.log_prob.to_bits()));
                }
                Event::Finished { id, finish, .. } => {
                    assert_eq!(self.results.entry(id).or_default().1.replace(finish), None);
                }
                Event::Passed { id, snapshot } => self.passed.entry(id).or_default().push(snapshot),
                Event::Scored { id, tokens } => self.scores.entry(id).or_default().extend(tokens),
                Event::Failed { id, error } => panic!("{id:?}: {error}"),
            }
        }
    }
}

fn settings(rows: usize, prefill_tokens: usize) -> BatchSettings {
    BatchSettings { prefill_tokens, ..BatchSettings::new(rows, CONTEXT) }
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
            ids.extend(coming.by_ref().take(6).map(|r| batcher.admit(again(r)).unwrap()));
            let mut most = 0;
            while !batcher.is_idle() {
                seen.step(&mut batcher);
                ids.extend(coming.by_ref().take(1).map(|r| batcher.admit(again(r)).unwrap()));
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

/// However many threads there are, and while they come and go, a lane each or not: the bits are those of the row alone.
#[test]
fn lanes_change_no_bit() {
    let plain = tiny(VOCAB, CONTEXT);
    let engine = Engine::new(plain.model().packed().unwrap(), Some(CONTEXT));
    let requests: Vec<Request> = LENGTHS.iter().enumerate().map(|(i, &n)| request(i, text(n, i), None)).collect();
    let wanted: Vec<Outcome> = requests.iter().map(|r| alone(&engine, r)).collect();
    for (threads, lanes) in [(&[1][..], 1), (&[2], 2), (&[5, 1, 3, 2], 3)] {
        let mut batcher = Batcher::new(engine.model(), settings(12, 512));
        let (mut seen, mut coming, mut ids, mut most) = (Seen::default(), requests.iter(), Vec::new(), 0);
        for &threads in threads.iter().cycle() {
            ids.extend(coming.by_ref().take(2).map(|r| batcher.admit(again(r)).unwrap()));
            if batcher.is_idle() {
                break;
            }
            pool::with_threads(threads, || seen.step(&mut batcher));
            most = most.max(batcher.lanes());
        }
        assert!((lanes..=threads[0]).contains(&most), "{most} lanes of {threads:?} threads");
        assert_eq!((ids.len(), batcher.bytes()), (LENGTHS.len(), 0));
        for (i, id) in ids.iter().enumerate() {
            assert_eq!(seen.results[id], wanted[i], "prompt of {} tokens, {threads:?} threads", LENGTHS[i]);
        }
    }
}

#[test]
fn a_prefix_is_read_once_and_changes_nothing() {
    let engine = tiny(VOCAB, CONTEXT);
    let (shared, mut batcher) = (text(130, 1), Batcher::new(engine.model(), settings(4, 64)));
    let mut seen = Seen::default();
    let first =
        batcher.admit(Request { keep: keeping(), max_new: Some(0), ..request(0, shared.clone(), None) }).unwrap();
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
    requests[1].keep = keeping();
    requests[4].keep = keeping();
    for budget in [64, 512] {
        let mut batcher = Batcher::new(engine.model(), settings(4, budget));
        let mut seen = Seen::default();
        let ids: Vec<RequestId> = requests.iter().map(|r| batcher.admit(again(r)).unwrap()).collect();
        while !batcher.is_idle() {
            seen.step(&mut batcher);
        }
        for ((request, id), i) in requests.iter().zip(&ids).zip(0..) {
            assert_eq!(seen.results[id], alone(&engine, request), "request {i}, {budget}");
            assert_eq!(seen.prefixes.contains_key(id), request.keep.prompt);
            if request.keep.prompt {
                let mut session = engine.session();
                session.read(&shared, &mut |_, _| true).unwrap();
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
    let ids: Vec<RequestId> = requests.iter().map(|r| batcher.admit(again(r)).unwrap()).collect();
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
    let kept = batcher.admit(Request { keep: keeping(), max_new: Some(0), ..plain(vec![5, 6, 7]) }).unwrap();
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

/// Reading is cut at the marks, and whoever begins from one gets the bits of whoever reads all of it.
#[test]
fn marks_cut_the_reading_without_a_trace() {
    let engine = tiny(VOCAB, CONTEXT);
    for (n, marks, wanted) in [
        (300, vec![64, 256, 100, 64, 298, 299, 0, 300, 999], vec![64, 256]),
        (66, vec![64], vec![64]),
        (65, vec![64], vec![]),
        (600, vec![128, 576], vec![128, 576]),
    ] {
        for budget in [16, 512] {
            let mut batcher = Batcher::new(engine.model(), settings(4, budget));
            let mut seen = Seen::default();
            let mut request = request(0, text(n, 3), None);
            request.keep = Keep { marks: marks.clone(), end: true, prompt: false };
            let id = batcher.admit(again(&request)).unwrap();
            let mut past = None;
            while !batcher.is_idle() {
                for event in batcher.step().unwrap() {
                    match event {
                        Event::Passed { snapshot, .. } => seen.passed.entry(id).or_default().push(snapshot),
                        Event::Drawn { token, .. } => {
                            seen.results.entry(id).or_default().0.push((token.id, token.log_prob.to_bits()));
                        }
                        Event::Finished { finish, past: at_end, .. } => {
                            seen.results.entry(id).or_default().1 = Some(finish);
                            past = at_end;
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
            let whole = alone(&engine, &request);
            assert_eq!(seen.results[&id], whole, "{n} tokens, {budget}");
            let passed = seen.passed.remove(&id).unwrap_or_default();
            assert_eq!(passed.iter().map(|s| s.tokens().len()).collect::<Vec<_>>(), wanted);
            // The last id drawn was never read.
            let drawn: Vec<u32> = whole.0.iter().map(|d| d.0).collect();
            assert_eq!(past.unwrap().tokens(), [&request.prompt[..], &drawn[..drawn.len() - 1]].concat());
            for snapshot in passed {
                let prefix = Some(Arc::new(Prefix { snapshot, logits: Vec::new() }));
                let mut batcher = Batcher::new(engine.model(), settings(4, budget));
                let id = batcher.admit(Request { prefix, ..again(&request) }).unwrap();
                let mut seen = Seen::default();
                while !batcher.is_idle() {
                    seen.step(&mut batcher);
                }
                assert_eq!(seen.results[&id], whole, "{n} tokens, {budget}");
            }
        }
    }
}

/// Sequences wait until the memory holds them at their longest; what could never be held is refused with the numbers.
#[test]
fn memory_is_never_promised_twice() {
    let engine = tiny(VOCAB, CONTEXT);
    let mut batcher = Batcher::new(engine.model(), settings(8, 512));
    let with = |n, max_new| Request { max_new, end_ids: Arc::default(), ..request(0, text(n, n), None) };
    let (small, large) = (batcher.needed(&with(20, Some(20))), batcher.needed(&with(300, None)));
    assert_eq!(batcher.needed(&with(300, Some(400))), large, "no text is longer than the context");
    batcher = Batcher::new(engine.model(), BatchSettings { memory: Some(2 * small), ..settings(8, 512) });
    assert!(large > 2 * small);
    let refused = batcher.admit(with(300, None)).unwrap_err();
    assert_eq!(refused, EngineError::Memory { tokens: CONTEXT, needed: large, memory: 2 * small });
    assert!(refused.to_string().contains("a text of up to 700 tokens needs"), "{refused}");
    let ids: Vec<RequestId> = (0..5).map(|_| batcher.admit(with(20, Some(20))).unwrap()).collect();
    let mut seen = Seen::default();
    seen.step(&mut batcher);
    assert_eq!((batcher.active(), batcher.waiting()), (2, 3));
    assert!(batcher.cancel(ids[0]));
    assert!(batcher.bytes() <= 2 * small);
    seen.step(&mut batcher);
    assert_eq!((batcher.active(), batcher.waiting()), (2, 2));
    while !batcher.is_idle() {
        seen.step(&mut batcher);
        assert!(batcher.bytes() <= 2 * small);
    }
    assert!(ids[1..].iter().all(|id| seen.results[id].1 == Some(Finish::Length)));
}

/// A guide narrows what is drawn, is told of it, and may fail its own sequence; the likeliest ids come along.
#[test]
fn guides_and_the_likeliest_ids() {
    #[derive(Debug)]
    struct Even(Vec<bool>, usize);
    impl Guide for Even {
        fn next(&mut self) -> Result<crate::guide::Next<'_>, crate::guide::GuideError> {
            match self.1 {
                2 => Ok(crate::guide::Next::Only(31)),
                5 => Err(crate::guide::GuideError("five are enough".into())),
                _ => Ok(crate::guide::Next::Among(&self.0)),
            }
        }
        fn take(&mut self, id: u32) -> Result<(), crate::guide::GuideError> {
            assert!(id.is_multiple_of(2) || self.1 == 2 && id == 31);
            self.1 += 1;
            Ok(())
        }
    }
    let engine = tiny(VOCAB, CONTEXT);
    let mut batcher = Batcher::new(engine.model(), settings(4, 512));
    let even = Box::new(Even((0..VOCAB).map(|id| id.is_multiple_of(2)).collect(), 0));
    let plain = || Request { end_ids: Arc::default(), max_new: Some(9), ..request(0, text(9, 1), None) };
    let guided = batcher.admit(Request { guide: Some(even), top_log_probs: 3, ..plain() }).unwrap();
    let free = batcher.admit(plain()).unwrap();
    let (mut drawn, mut failed) = (HashMap::<RequestId, Vec<u32>>::new(), None);
    while !batcher.is_idle() {
        for event in batcher.step().unwrap() {
            match event {
                Event::Drawn { id, token, top } => {
                    drawn.entry(id).or_default().push(token.id);
                    assert_eq!(top.len(), if id == guided { 3 } else { 0 });
                    assert!(top.is_sorted_by(|a, b| a.1 >= b.1) && top.iter().all(|t| t.1 <= 0.0));
                    assert!(top.iter().all(|t| t.0 != token.id || t.1 == token.log_prob));
                }
                Event::Failed { id, error } => failed = Some((id, error)),
                Event::Finished { id, .. } => assert_eq!(id, free),
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!((drawn[&guided].len(), drawn[&free].len(), drawn[&guided][2]), (5, 9, 31));
    assert_eq!(failed, Some((guided, EngineError::Guide(crate::guide::GuideError("five are enough".into())))));
}

/// A prompt's scores are those of the whole text read at once, to the bit, wherever it is cut and whoever reads beside it;
/// and they change nothing of what is drawn.
#[test]
fn prompts_are_scored() {
    let engine = tiny(VOCAB, CONTEXT);
    let model = engine.model();
    let whole = |prompt: &[u32]| -> Vec<(u32, u32)> {
        let at = vec![(0..prompt.len()).collect()];
        let batch = Batch::new(vec![prompt.to_vec()]).at(at);
        let hidden = model.forward(&batch, Some(&mut Cache::new(model, 1)), &mut Trace::none());
        let logits = to_host(model.logits(hidden)).unwrap();
        let next = prompt.iter().skip(1).zip(logits.chunks_exact(VOCAB));
        next.map(|(&id, logits)| (id, log_probs(logits)[id as usize].to_bits())).collect()
    };
    for budget in [64, 512] {
        let mut batcher = Batcher::new(model, settings(5, budget));
        let lengths = [1, 2, 64, 65, 131, 300];
        let requests: Vec<Request> = (lengths.iter().enumerate())
            .map(|(i, &n)| Request {
                score_prompt: i != 3,
                top_log_probs: 2,
                max_new: Some(i % 3),
                ..request(i, text(n, i), None)
            })
            .collect();
        let ids: Vec<RequestId> = (requests.iter())
            .map(|r| {
                let (score_prompt, top_log_probs) = (r.score_prompt, r.top_log_probs);
                batcher.admit(Request { score_prompt, top_log_probs, ..again(r) }).unwrap()
            })
            .collect();
        let mut seen = Seen::default();
        while !batcher.is_idle() {
            seen.step(&mut batcher);
        }
        for ((request, id), n) in requests.iter().zip(&ids).zip(lengths) {
            assert_eq!(seen.results[id], alone(&engine, request), "{n} tokens, {budget}");
            let got = seen.scores.remove(id).unwrap_or_default();
            let wanted = if request.score_prompt { whole(&request.prompt) } else { Vec::new() };
            let bits: Vec<(u32, u32)> = got.iter().map(|s| (s.id, s.log_prob.to_bits())).collect();
            assert_eq!(bits, wanted, "{n} tokens, {budget}");
            for Scored { id, log_prob, top } in got {
                assert!(top.len() == 2 && top[0].1 >= top[1].1 && top[1].1 <= 0.0);
                assert!(log_prob <= top[0].1 && top.iter().all(|t| t.0 != id || t.1 == log_prob));
            }
        }
    }
}
