//! Conversations through the scheduler and its prefix cache on a device: what comes from the cache is what reading
//! everything gives, within rounding. (On the CPU every bit is held: `infer/src/batching`.)

use m1_infer::batching::scheduler::{Choice, Job, Scheduler, SchedulerSettings, Update};
use m1_infer::batching::{BatchSettings, prefix_cache::CacheStats};
use m1_infer::sampler::{Sampler, SamplingOptions};
use m1_model::M1;
use m1_tests::golden::Golden;
use std::collections::HashMap;
use std::sync::Arc;

const REPLY: usize = 4;

fn settings(cache_bytes: u64) -> SchedulerSettings {
    SchedulerSettings::new(BatchSettings::new(2, 512), cache_bytes)
}

fn job(prompt: &[u32]) -> Job {
    let greedy = SamplingOptions { temperature: 0.0, ..SamplingOptions::default() };
    let sampler = Sampler::new(greedy, None).expect("greedy is a valid setting");
    Job {
        prompt: prompt.to_vec(),
        turns: Vec::new(),
        choices: vec![Choice { sampler, guide: None }],
        end_ids: Arc::default(),
        max_new: Some(REPLY),
        top_log_probs: 0,
        score_prompt: false,
    }
}

/// Ids and log-probabilities of every prompt's reply, all prompts at once; and how much came from the cache.
fn run(scheduler: &mut Scheduler, prompts: &[Vec<u32>]) -> Vec<(Vec<u32>, Vec<f32>, usize)> {
    let ids: Vec<_> = prompts.iter().map(|p| scheduler.submit(job(p)).expect("the prompt fits")).collect();
    let mut replies: HashMap<_, (Vec<u32>, Vec<f32>, usize)> = HashMap::new();
    while !scheduler.is_idle() {
        for (id, update) in scheduler.step().expect("the device works") {
            let reply = replies.entry(id).or_default();
            match update {
                Update::Read { cached } => reply.2 = cached,
                Update::Drawn { token, .. } => {
                    reply.0.push(token.id);
                    reply.1.push(token.log_prob);
                }
                Update::Finished { .. } | Update::Scored(_) => {}
                Update::Failed(error) => panic!("{error}"),
            }
        }
    }
    ids.iter().map(|id| replies.remove(id).expect("every job has a reply")).collect()
}

fn check(model: &M1, text: &[u32]) -> CacheStats {
    let mut scheduler = Scheduler::new(model, settings(1 << 30));
    let fresh = |prompt: &[u32]| run(&mut Scheduler::new(model, settings(0)), &[prompt.to_vec()]).remove(0);
    let mut past = vec![text[..70].to_vec(), text[100..170].to_vec()];
    for turn in 0..2 {
        let replies = run(&mut scheduler, &past);
        for (i, (ids, log_probs, cached)) in replies.iter().enumerate() {
            let (wanted, wanted_log_probs, _) = fresh(&past[i]);
            assert_eq!(ids, &wanted, "turn {turn}");
            for (a, b) in log_probs.iter().zip(&wanted_log_probs) {
                assert!((a - b).abs() < 1e-4, "turn {turn}: {a} is not {b}");
            }
            // The reply's last id was never read.
            assert_eq!(*cached, if turn == 0 { 0 } else { past[i].len() - 7 }, "turn {turn}");
        }
        for (past, (ids, ..)) in past.iter_mut().zip(&replies) {
            past.extend(ids);
            past.extend(&text[200..206]);
        }
    }
    // The first text edited: from the snapshot before its last tokens.
    let edited = [&text[..66], &text[300..304]].concat();
    let edited_reply = run(&mut scheduler, std::slice::from_ref(&edited)).remove(0);
    assert_eq!((edited_reply.2, &edited_reply.0), (64, &fresh(&edited).0));
    scheduler.cache()
}

#[test]
fn on_the_cpu() {
    let golden = Golden::open("hybrid");
    let stats = check(&golden.model(&burn::tensor::Device::flex()), &golden.tokens);
    assert_eq!((stats.lookups, stats.hits, stats.evictions), (5, 3, 0));
}

#[test]
fn on_wgpu() {
    let Some(device) = m1_tests::wgpu() else {
        return;
    };
    let golden = Golden::open("hybrid");
    check(&golden.model(&device), &golden.tokens);
}
