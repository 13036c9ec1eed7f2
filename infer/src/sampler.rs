//! From logits to one id. The order of the steps is that of Hugging Face's `generate` (penalty, temperature, top-k,
//! top-p, min-p), since that is what a checkpoint's `generation_config.json` was tuned with; what is different is the
//! mask: ids that the tokenizer does not know (M1's embedding has such rows) are out before anything else is looked at.

use crate::guide::Next;
use m1_kernels::base::math::exps;
use m1_kernels::base::simd::level;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

/// How to sample. The defaults are MiniMax-M1's own: temperature 1.0, top_p 0.95.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 takes the most likely id (greedy).
    pub temperature: f32,
    /// Keep the `top_k` most likely ids; 0 keeps all.
    pub top_k: usize,
    /// Keep the fewest ids whose probabilities reach `top_p` together; 1 keeps all.
    pub top_p: f32,
    /// Keep ids at least `min_p` times as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Above 1, ids that stand in the text become less likely (CTRL, arXiv 1909.05858); 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of every id that was drawn before (OpenAI's `presence_penalty`); 0 is off.
    pub presence_penalty: f32,
    /// Subtracted as often as the id was drawn before (OpenAI's `frequency_penalty`); 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of these ids (OpenAI's `logit_bias`); from 100 down an id is as good as forbidden.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the draw; `None` takes one from the operating system's entropy.
    pub seed: Option<u64>,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 0.95,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

/// What is wrong with the options or with the logits.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
pub enum SamplerError {
    /// A setting outside its range.
    #[error("{name} is {value}, and must be {range}")]
    Range {
        /// The setting's name.
        name: &'static str,
        /// Its value.
        value: f32,
        /// What would be right.
        range: &'static str,
    },
    /// The model's output is NaN or infinite, so that nothing can be drawn.
    #[error("the model's logits are not finite (id {id}): the weights are damaged or overflow their dtype")]
    NotFinite {
        /// First id with such a logit.
        id: usize,
    },
    /// Mask and logits of different sizes, or a mask that allows nothing.
    #[error("no id can be sampled: of {vocab} ids none is both known to the tokenizer and allowed here")]
    NothingAllowed {
        /// Length of the logits.
        vocab: usize,
    },
}

impl SamplingOptions {
    /// Checks every range; the error names the setting.
    pub fn validate(&self) -> Result<(), SamplerError> {
        let check = |ok: bool, name, value, range| {
            if ok { Ok(()) } else { Err(SamplerError::Range { name, value, range }) }
        };
        let t = self.temperature;
        check((0.0..=100.0).contains(&t), "temperature", t, "between 0 (greedy) and 100")?;
        check(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1")?;
        check((0.0..=1.0).contains(&self.min_p), "min_p", self.min_p, "between 0 and 1")?;
        let r = self.repetition_penalty;
        check(r > 0.0 && r <= 100.0, "repetition_penalty", r, "above 0 and at most 100 (1 is off)")?;
        let between = "between -2 and 2";
        check((-2.0..=2.0).contains(&self.presence_penalty), "presence_penalty", self.presence_penalty, between)?;
        check((-2.0..=2.0).contains(&self.frequency_penalty), "frequency_penalty", self.frequency_penalty, between)?;
        let wrong = self.logit_bias.iter().find(|(_, bias)| !(-100.0..=100.0).contains(bias));
        wrong.map_or(Ok(()), |&(_, bias)| check(false, "logit_bias", bias, "between -100 and 100"))
    }
}

/// One drawn id.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// The token id.
    pub id: u32,
    /// Its log-probability under the model: log-softmax of the raw logits over the whole vocabulary.
    pub log_prob: f32,
    /// Its log-probability under the distribution it was drawn from (0 when greedy).
    pub draw_log_prob: f32,
}

/// Draws ids; the same seed and the same logits give the same ids.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplingOptions,
    /// The ids that may be drawn, ascending, where not all may. Shared by the sampler's clones.
    allowed: Option<Arc<[u32]>>,
    rng: ChaCha8Rng,
    seed: u64,
    candidates: Vec<(u32, f32)>,
    /// `e^(logit - largest)` of every id: the log-probability needs them, and most draws too.
    exps: Vec<f32>,
    /// The candidates' logits as the temperature has them.
    scaled: Vec<f32>,
    /// How often each id was drawn; kept where presence or frequency is penalised.
    drawn: HashMap<u32, u32>,
}

impl Sampler {
    /// A sampler that draws only ids for which `allowed` is true (`None`: any id).
    pub fn new(options: SamplingOptions, allowed: Option<Vec<bool>>) -> Result<Self, SamplerError> {
        options.validate()?;
        let seed = options.seed.unwrap_or_else(random_seed);
        let ids = |allowed: Vec<bool>| (0..).zip(allowed).filter_map(|(id, allowed)| allowed.then_some(id)).collect();
        let allowed = allowed.map(ids);
        Ok(Self {
            options,
            allowed,
            rng: ChaCha8Rng::seed_from_u64(seed),
            seed,
            candidates: Vec::new(),
            exps: Vec::new(),
            scaled: Vec::new(),
            drawn: HashMap::new(),
        })
    }

    /// The seed in use, also when it was not given.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The settings in use.
    pub fn options(&self) -> &SamplingOptions {
        &self.options
    }

    /// Changes the settings; the random stream goes on where it was, unless the new settings name another seed.
    pub fn set_options(&mut self, options: SamplingOptions) -> Result<(), SamplerError> {
        options.validate()?;
        if let Some(seed) = options.seed.filter(|&seed| seed != self.seed) {
            self.reseed(seed);
        }
        self.options = options;
        Ok(())
    }

    /// Begins the random stream of `seed` from its start, also where it is the seed in use.
    pub fn reseed(&mut self, seed: u64) {
        self.options.seed = Some(seed);
        self.seed = seed;
        self.rng = ChaCha8Rng::seed_from_u64(seed);
    }

    /// Draws the id that follows `text` (its ids so far; only the repetition penalty looks at them) from raw
    /// `logits` `[vocab]`.
    pub fn sample(&mut self, logits: &[f32], text: &[u32]) -> Result<Sampled, SamplerError> {
        self.sample_next(logits, text, Next::Any)
    }

    /// As [`Sampler::sample`], among the ids that `next` allows.
    pub fn sample_next(&mut self, logits: &[f32], text: &[u32], next: Next<'_>) -> Result<Sampled, SamplerError> {
        // Without an early end, so that it goes a register at a time.
        if !logits.iter().fold(true, |finite, l| finite & l.is_finite()) {
            let id = logits.iter().position(|l| !l.is_finite()).unwrap_or(0);
            return Err(SamplerError::NotFinite { id });
        }
        let candidates = &mut self.candidates;
        candidates.clear();
        if let Next::Only(id) = next {
            candidates.extend(logits.get(id as usize).map(|&logit| (id, logit)));
        } else if let Some(ids) = &self.allowed {
            let within = ids.partition_point(|&id| (id as usize) < logits.len());
            candidates.extend(ids[..within].iter().map(|&id| (id, logits[id as usize])));
        } else {
            candidates.extend((0u32..).zip(logits.iter().copied()));
        }
        if let Next::Among(mask) = next {
            candidates.retain(|&(id, _)| mask.get(id as usize).is_some_and(|&allowed| allowed));
        }
        if self.candidates.is_empty() {
            return Err(SamplerError::NothingAllowed { vocab: logits.len() });
        }
        let max = largest(logits);
        self.exps.resize(logits.len(), 0.0);
        let norm = f64::from(max) + exps(level(), logits, max, &mut self.exps).ln();
        self.penalise(logits.len(), text);
        self.shift();
        let (id, draw_log_prob) =
            if self.options.temperature == 0.0 { (self.greedy(), 0.0) } else { self.draw(logits, max) };
        if self.counts() {
            *self.drawn.entry(id).or_default() += 1;
        }
        Ok(Sampled { id, log_prob: (f64::from(logits[id as usize]) - norm) as f32, draw_log_prob })
    }

    /// Whether what was drawn matters to what will be.
    fn counts(&self) -> bool {
        self.options.presence_penalty != 0.0 || self.options.frequency_penalty != 0.0
    }

    /// Adds to the logits what was asked for: the bias, and the penalties for ids that were drawn.
    fn shift(&mut self) {
        let options = &self.options;
        for &(id, bias) in &options.logit_bias {
            // In order of their ids, so that each is found by halving.
            if let Ok(i) = self.candidates.binary_search_by_key(&id, |c| c.0) {
                self.candidates[i].1 += bias;
            }
        }
        for (id, &times) in &self.drawn {
            if let Ok(i) = self.candidates.binary_search_by_key(id, |c| c.0) {
                self.candidates[i].1 -= options.presence_penalty + options.frequency_penalty * times as f32;
            }
        }
    }

    fn penalise(&mut self, vocab: usize, text: &[u32]) {
        let penalty = self.options.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut seen = vec![false; vocab];
        for &id in text {
            if let Some(seen) = seen.get_mut(id as usize) {
                *seen = true;
            }
        }
        for (id, logit) in &mut self.candidates {
            if seen[*id as usize] {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    /// The likeliest candidate; of equals the one with the lowest id.
    fn greedy(&self) -> u32 {
        let best = self.candidates.iter().copied().reduce(|a, b| if b.1 > a.1 { b } else { a });
        best.map_or(0, |(id, _)| id)
    }

    /// `all_max` is the largest of all raw `logits`.
    fn draw(&mut self, logits: &[f32], all_max: f32) -> (u32, f32) {
        let SamplingOptions { temperature, top_k, top_p, min_p, .. } = self.options;
        let c = &mut self.candidates;
        // Likeliest first and, of equals, lowest id first: the order must not depend on the sort.
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if top_k > 0 && top_k < c.len() {
            c.select_nth_unstable_by(top_k - 1, order);
            c.truncate(top_k);
        }
        let max = c.iter().fold(f32::NEG_INFINITY, |m, x| m.max(x.1));
        // Weights, the largest is 1; mostly those that are there already, to the bit: of what no penalty and no bias has changed.
        if temperature == 1.0 && max == all_max {
            for (id, logit) in c.iter_mut() {
                let changed = *logit != logits[*id as usize];
                *logit = if changed { exp(*logit - max) } else { self.exps[*id as usize] };
            }
        } else {
            self.scaled.clear();
            self.scaled.extend(c.iter().map(|x| (x.1 - max) / temperature));
            exps(level(), &self.scaled, 0.0, &mut self.exps);
            c.iter_mut().zip(&self.exps).for_each(|(x, &weight)| x.1 = weight);
        }
        if top_p < 1.0 {
            let total = total(c);
            // All ids lighter than this together weigh less than 1 - top_p: none of them is in the nucleus, and
            // 200 K of them need no sorting.
            let floor = ((1.0 - f64::from(top_p)) * total / c.len() as f64) as f32;
            c.retain(|x| x.1 >= floor);
            c.sort_unstable_by(order);
            let target = f64::from(top_p) * total;
            let mut sum = 0.0;
            let kept = c.iter().position(|x| {
                sum += f64::from(x.1);
                sum >= target
            });
            c.truncate(kept.map_or(c.len(), |last| last + 1).max(1));
        }
        if min_p > 0.0 {
            c.retain(|x| x.1 >= min_p);
        }
        let total = total(c);
        let mut left = self.rng.random::<f64>() * total;
        // Rounding may leave a hair of `left` after the last weight that is not zero: it takes the draw then.
        let mut drawn = c[0];
        for &x in c.iter().filter(|x| x.1 > 0.0) {
            drawn = x;
            left -= f64::from(x.1);
            if left < 0.0 {
                break;
            }
        }
        (drawn.0, (f64::from(drawn.1) / total).ln() as f32)
    }
}

/// A seed that differs from call to call and from process to process: what the standard library keys its hash maps with.
pub fn random_seed() -> u64 {
    std::hash::RandomState::new().build_hasher().finish()
}

/// log-softmax of `logits` `[vocab]` at `id`; the sum is taken in f64.
pub fn log_prob(logits: &[f32], id: u32) -> f32 {
    (f64::from(logits[id as usize]) - log_sum_exp(logits)) as f32
}

/// The `n` likeliest ids with log-softmax of `logits`, likeliest first; of equals the lowest id.
pub fn top_log_probs(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    if n == 0 {
        return Vec::new(); // what is mostly asked for, at every draw
    }
    let norm = log_sum_exp(logits);
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let mut all: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
    if n < all.len() {
        all.select_nth_unstable_by(n, order);
        all.truncate(n);
    }
    all.sort_unstable_by(order);
    all.iter_mut().for_each(|x| x.1 = (f64::from(x.1) - norm) as f32);
    all
}

/// log-softmax of `logits` over the whole vocabulary.
pub fn log_probs(logits: &[f32]) -> Vec<f32> {
    let norm = log_sum_exp(logits);
    logits.iter().map(|&l| (f64::from(l) - norm) as f32).collect()
}

/// As [`exps`] has it.
fn exp(x: f32) -> f32 {
    let mut y = [0.0];
    exps(level(), &[x], 0.0, &mut y);
    y[0]
}

/// The weights' sum, in eight parts that are added up side by side.
fn total(candidates: &[(u32, f32)]) -> f64 {
    let (chunks, rest) = candidates.as_chunks::<8>();
    let mut sums = [0.0_f64; 8];
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += f64::from(x.1));
    }
    sums.iter().sum::<f64>() + rest.iter().map(|x| f64::from(x.1)).sum::<f64>()
}

fn largest(logits: &[f32]) -> f32 {
    let (chunks, rest) = logits.as_chunks::<16>();
    let mut most = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        most.iter_mut().zip(chunk).for_each(|(m, &l)| *m = m.max(l));
    }
    most.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &l| m.max(l))
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = largest(logits);
    f64::from(max) + exps(level(), logits, max, &mut vec![0.0; logits.len()]).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(options: SamplingOptions) -> Sampler {
        Sampler::new(SamplingOptions { seed: options.seed.or(Some(7)), ..options }, None).unwrap()
    }

    fn plain() -> SamplingOptions {
        SamplingOptions { top_p: 1.0, ..SamplingOptions::default() }
    }

    /// ids drawn from `logits` in 20,000 draws, as frequencies.
    fn frequencies(options: SamplingOptions, logits: &[f32]) -> Vec<f64> {
        let mut sampler = sampler(options);
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..20_000 {
            counts[sampler.sample(logits, &[]).unwrap().id as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    fn close(found: &[f64], wanted: &[f64]) {
        for (f, w) in found.iter().zip(wanted) {
            assert!((f - w).abs() < 0.012 && (*w > 0.0 || *f == 0.0), "{found:?} is not {wanted:?}");
        }
    }

    fn logs(p: &[f32]) -> Vec<f32> {
        p.iter().map(|p| p.ln() + 3.0).collect()
    }

    #[test]
    fn frequencies_follow_each_setting() {
        let logits = logs(&[0.1, 0.4, 0.2, 0.3]);
        let found = |change: fn(&mut SamplingOptions)| {
            let mut options = plain();
            change(&mut options);
            frequencies(options, &logits)
        };
        let two = [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0];
        close(&found(|_| ()), &[0.1, 0.4, 0.2, 0.3]);
        close(&found(|o| o.top_k = 2), &two);
        close(&found(|o| o.top_p = 0.65), &two);
        close(&found(|o| o.top_p = 0.75), &[0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]);
        close(&found(|o| o.min_p = 0.6), &two);
        // Temperature 1/2 squares the probabilities.
        let squares = [1.0 / 30.0, 16.0 / 30.0, 4.0 / 30.0, 9.0 / 30.0];
        close(&found(|o| o.temperature = 0.5), &squares);
        // top_p looks at what top_k left: of {0.4, 0.3} the first alone is 57 %.
        let first = |o: &mut SamplingOptions| (o.top_k, o.top_p) = (2, 0.5);
        close(&found(first), &[0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn a_large_vocabulary_is_cut_at_the_same_place_as_by_sorting_it_all() {
        let n = 5000;
        let logits: Vec<f32> = (0..n).map(|i| ((i * 7919) % n) as f32 * 0.004).collect();
        let mut p = log_probs(&logits).iter().map(|l| f64::from(l.exp())).collect::<Vec<_>>();
        p.sort_by(|a, b| b.total_cmp(a));
        let mut sum = 0.0;
        let nucleus = p
            .iter()
            .take_while(|p| {
                let more = sum < 0.9;
                sum += **p;
                more
            })
            .count();
        let mut sampler = sampler(SamplingOptions { top_p: 0.9, ..plain() });
        sampler.sample(&logits, &[]).unwrap();
        assert!(sampler.candidates.len().abs_diff(nucleus) <= 1, "{} of {nucleus}", sampler.candidates.len());
        assert!(nucleus > 300 && nucleus < 4000);
    }

    #[test]
    fn same_seed_same_ids_and_another_seed_others() {
        let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin()).collect();
        let ids = |seed| {
            let mut s = sampler(SamplingOptions { seed: Some(seed), ..SamplingOptions::default() });
            (0..50).map(|_| s.sample(&logits, &[]).unwrap().id).collect::<Vec<_>>()
        };
        assert_eq!(ids(1), ids(1));
        assert_ne!(ids(1), ids(2));
        let mut s = sampler(SamplingOptions::default());
        let mut ten = |reseed: bool| {
            if reseed {
                s.reseed(7);
            }
            (0..10).map(|_| s.sample(&logits, &[]).unwrap().id).collect::<Vec<_>>()
        };
        let first = ten(false);
        assert_ne!(ten(false), first);
        assert_eq!(ten(true), first);
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals_and_reports_the_models_log_probability() {
        let mut s = sampler(SamplingOptions { temperature: 0.0, ..plain() });
        let got = s.sample(&[0.0, 2.0, 2.0], &[]).unwrap();
        assert_eq!(got.id, 1);
        let wanted = -(2.0 + (-2.0f32).exp()).ln();
        assert!((got.log_prob - wanted).abs() < 1e-6, "{} {wanted}", got.log_prob);
    }

    #[test]
    fn the_drawn_log_probability_is_that_of_the_cut_distribution() {
        let logits = logs(&[0.5, 0.3, 0.2]);
        let mut s = sampler(SamplingOptions { top_k: 2, ..plain() });
        for _ in 0..20 {
            let got = s.sample(&logits, &[]).unwrap();
            let (model, draw) = if got.id == 0 { (0.5f32, 0.625f32) } else { (0.3, 0.375) };
            assert!((got.log_prob - model.ln()).abs() < 1e-5 && (got.draw_log_prob - draw.ln()).abs() < 1e-5);
        }
    }

    /// A draw shares exponentials with the log-probability, but for what a bias or a penalty has changed: the largest logit
    /// allowed or not, changed or not.
    #[test]
    fn exponentials_are_shared_where_they_are_the_same() {
        let logits: Vec<f32> = (0..300).map(|i| (i as f32 * 0.37).sin() * 4.0).collect();
        let best = (0..300).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        for (without_best, changed) in
            [(false, None), (true, None), (false, Some(5)), (false, Some(best)), (true, Some(5))]
        {
            let allowed = (0..300).map(|i| i % 7 != 3 && !(without_best && i == best)).collect::<Vec<_>>();
            let mut own = logits.clone();
            changed.iter().for_each(|&id: &usize| own[id] += 1.5);
            let wanted: f64 = (0..300).filter(|&i| allowed[i]).map(|i| f64::from(own[i]).exp()).sum();
            let logit_bias = changed.iter().map(|&id| (id as u32, 1.5)).collect();
            let options = SamplingOptions { seed: Some(4), logit_bias, ..plain() };
            let mut sampler = Sampler::new(options, Some(allowed.clone())).unwrap();
            for _ in 0..200 {
                let drawn = sampler.sample(&logits, &[]).unwrap();
                assert!(allowed[drawn.id as usize]);
                assert_eq!(drawn.log_prob, log_prob(&logits, drawn.id));
                let p = f64::from(own[drawn.id as usize]).exp() / wanted;
                assert!((f64::from(drawn.draw_log_prob) - p.ln()).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn unknown_ids_are_never_sampled_however_likely() {
        let options = SamplingOptions { seed: Some(1), temperature: 2.0, ..plain() };
        let mut s = Sampler::new(options.clone(), Some(vec![true, false, true])).unwrap();
        // Logits longer than the mask: what lies beyond it is unknown too.
        let logits = [0.0, 50.0, 0.1, 90.0];
        assert!((0..500).all(|_| [0, 2].contains(&s.sample(&logits, &[]).unwrap().id)));
        s.set_options(SamplingOptions { temperature: 0.0, ..options.clone() }).unwrap();
        assert_eq!(s.sample(&logits, &[]).unwrap().id, 2);
        let mut none = Sampler::new(options, Some(vec![false; 4])).unwrap();
        assert!(matches!(none.sample(&logits, &[]), Err(SamplerError::NothingAllowed { .. })));
    }

    #[test]
    fn a_guide_narrows_the_choice() {
        let logits = [5.0, 1.0, 0.9, 0.0];
        let mut s =
            Sampler::new(SamplingOptions { temperature: 0.0, ..plain() }, Some(vec![true, true, true])).unwrap();
        let mut drawn = |next| s.sample_next(&logits, &[], next).map(|s| s.id);
        assert_eq!(drawn(Next::Any), Ok(0));
        assert_eq!(drawn(Next::Among(&[false, false, true, true])), Ok(2));
        assert_eq!(drawn(Next::Only(2)), Ok(2));
        assert_eq!(drawn(Next::Among(&[])), Err(SamplerError::NothingAllowed { vocab: 4 }));
        assert_eq!(drawn(Next::Only(4)), Err(SamplerError::NothingAllowed { vocab: 4 }));
        // The log-probability is the model's, whatever was allowed.
        let got = s.sample_next(&logits, &[], Next::Only(3)).unwrap();
        assert_eq!(got.log_prob, log_prob(&logits, 3));
    }

    #[test]
    fn bias_and_penalties_are_added_to_the_logits() {
        let logits = logs(&[0.4, 0.3, 0.2, 0.1]);
        let greedy = SamplingOptions { temperature: 0.0, ..plain() };
        let ids = |change: fn(&mut SamplingOptions)| {
            let mut options = greedy.clone();
            change(&mut options);
            let mut s = sampler(options);
            (0..6).map(|_| s.sample(&logits, &[0, 0, 1]).unwrap().id).collect::<Vec<_>>()
        };
        assert_eq!(ids(|o| o.logit_bias = vec![(3, 2.0), (0, -100.0), (77, 1.0)]), [3; 6]);
        // What stands in the prompt is not counted. ln 0.4 - 1.2 < ln 0.2 < ln 0.3; then all but the last were drawn.
        assert_eq!(ids(|o| o.presence_penalty = 1.2), [0, 1, 2, 0, 0, 0]);
        assert_eq!(ids(|o| o.frequency_penalty = 0.6)[..4], [0, 1, 0, 2]);
        let biased = frequencies(SamplingOptions { logit_bias: vec![(3, 2.0f32.ln())], ..plain() }, &logits);
        close(&biased, &[4.0 / 11.0, 3.0 / 11.0, 2.0 / 11.0, 2.0 / 11.0]);
    }

    #[test]
    fn the_likeliest_come_first() {
        let logits = [1.0, 3.0, 2.0, 3.0];
        let top = top_log_probs(&logits, 3);
        assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 2]);
        assert_eq!(top[2].1, log_prob(&logits, 2));
        assert_eq!(top_log_probs(&logits, 9).len(), 4);
        assert_eq!(top_log_probs(&logits, 0), []);
    }

    #[test]
    fn repetition_penalty_pushes_either_sign_down() {
        let mut s = sampler(SamplingOptions { temperature: 0.0, repetition_penalty: 2.0, ..plain() });
        assert_eq!(s.sample(&[1.0, 1.5], &[1, 1, 99]).unwrap().id, 0);
        assert_eq!(s.sample(&[-1.5, -1.0], &[1]).unwrap().id, 0);
        assert_eq!(s.sample(&[-1.5, -1.0], &[]).unwrap().id, 1);
    }

    #[test]
    fn bad_settings_and_bad_logits_are_errors() {
        type Change = fn(&mut SamplingOptions);
        let wrong: [(&str, Change); 8] = [
            ("presence_penalty", |o| o.presence_penalty = 2.1),
            ("frequency_penalty", |o| o.frequency_penalty = f32::NAN),
            ("logit_bias", |o| o.logit_bias = vec![(0, 1.0), (1, -101.0)]),
            ("temperature", |o| o.temperature = -1.0),
            ("temperature", |o| o.temperature = f32::NAN),
            ("top_p", |o| o.top_p = 0.0),
            ("min_p", |o| o.min_p = 1.5),
            ("repetition_penalty", |o| o.repetition_penalty = 0.0),
        ];
        for (name, change) in wrong {
            let mut options = plain();
            change(&mut options);
            assert!(options.validate().unwrap_err().to_string().starts_with(name));
        }
        let mut s = sampler(plain());
        assert_eq!(s.sample(&[0.0, f32::NAN], &[]), Err(SamplerError::NotFinite { id: 1 }));
        // Extremes that underflow every other weight still draw.
        assert_eq!(s.sample(&[-1e30, 1e30], &[]).unwrap().id, 1);
    }
}
