//! One training step: examples in, a better model out.
//!
//! Different here: Burn's CPU backend leaves small tensors to one core, so a step is split into micro-batches that
//! threads work through side by side, each with its own autodiff graph on the same weights. What a micro-batch holds
//! and the order of the sums depend on the examples alone: any number of threads gives the same bits.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use m1_kernels::base::pool;
use m1_kernels::linear::Weight;
use m1_kernels::log_prob::log_prob;
use m1_model::batch::Batch;
use m1_model::model::{M1, router_aux_loss};
use m1_model::trace::Trace;

use crate::data::Example;
use crate::gradient_checkpointing::{self, Passed};
use crate::optimizer::{Optimizer, OptimizerSettings};
use crate::parameters;

/// What can go wrong in a step.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The loss or the gradient is no number any more.
    #[error("step {step}: the loss is {loss} and the gradient's norm {grad_norm}; a lower --lr or --clip would help")]
    Diverged {
        /// The step that failed, from 1.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its gradient's norm.
        grad_norm: f64,
    },
    /// No token of the step is to be learned.
    #[error("step {step}: no token of its {examples} examples counts towards the loss")]
    NothingToLearn {
        /// The step, from 1.
        step: u64,
        /// Examples in it.
        examples: usize,
    },
    /// The threads could not be started.
    #[error("cannot start {threads} threads: {reason}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What the system said.
        reason: String,
    },
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Mean cross-entropy of the tokens to be learned, in nats.
    pub loss: f64,
    /// Auxiliary router loss, coefficient included.
    pub aux_loss: f64,
    /// Norm of the gradient over all parameters, before clipping.
    pub grad_norm: f64,
    /// Tokens read.
    pub tokens: usize,
    /// Highest share of an expert over its fair share, over all layers.
    pub expert_load_max: f64,
    /// Lowest share of an expert over its fair share, over all layers.
    pub expert_load_min: f64,
    /// Seconds that the step took.
    pub seconds: f64,
}

const PRESENT: &str = "the model is there between steps";

/// A model in training.
pub struct Trainer {
    /// Absent only while a step changes it.
    model: Option<M1>,
    device: Device,
    optimizer: Optimizer,
    pools: Vec<rayon::ThreadPool>,
    micro_tokens: usize,
    gradient_checkpointing: bool,
    bf16: bool,
    steps: u64,
}

impl Trainer {
    /// Takes the model (on a device without autodiff) into training after `steps` steps done before.
    ///
    /// `micro_tokens` is the size that a step's batch is split into, `threads` how many parts are worked on at once.
    pub fn new(
        model: M1,
        settings: OptimizerSettings,
        micro_tokens: usize,
        threads: usize,
        steps: u64,
    ) -> Result<Self, TrainError> {
        Ok(Self {
            device: model.device(),
            optimizer: Optimizer::new(settings, parameters::infos(&model)),
            model: Some(model),
            pools: workers(threads)?,
            micro_tokens,
            gradient_checkpointing: false,
            bf16: false,
            steps,
        })
    }

    /// The model as it stands.
    pub fn model(&self) -> &M1 {
        self.model.as_ref().expect(PRESENT)
    }

    /// The optimizer, to save its moments.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// The optimizer, to load its moments.
    pub fn optimizer_mut(&mut self) -> &mut Optimizer {
        &mut self.optimizer
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One step of the optimizer at learning rate `lr` on these examples together.
    pub fn step(&mut self, examples: &[Example], lr: f64) -> Result<StepReport, TrainError> {
        let count: usize = examples.iter().map(targets).sum();
        if count == 0 {
            return Err(TrainError::NothingToLearn { step: self.steps + 1, examples: examples.len() });
        }
        let tokens = examples.iter().map(|e| e.ids.len()).sum();
        let examples: Vec<&Example> = examples.iter().filter(|e| targets(e) > 0).collect();
        let lengths: Vec<usize> = examples.iter().map(|e| e.ids.len()).collect();
        let micros: Vec<(Batch, Vec<u32>)> = split(&lengths, self.micro_tokens)
            .into_iter()
            .map(|micro| learned(&micro.into_iter().map(|i| examples[i]).collect::<Vec<_>>()))
            .collect();
        let (batches, next): (Vec<Batch>, Vec<Vec<u32>>) = micros.into_iter().unzip();
        let loss = |i: usize, hidden, head: &Weight<2>| {
            let (log_probs, _) = log_prob(hidden, head, &next[i], 1.0);
            Ok::<_, TrainError>((log_probs.sum().neg() / count as f64, ()))
        };
        let (report, _) = self.update(&batches, loss, lr)?;
        Ok(StepReport { tokens, ..report })
    }

    /// One step of the optimizer at learning rate `lr` on a loss that is given part by part.
    ///
    /// `loss(i, hidden, head)` is the loss `[1]` of batch `i`, from the hidden states that the batch asks for and the weight of
    /// the head, and whatever the caller wants to know of it; the parts' losses add up to the step's. The router's
    /// auxiliary loss is added here, by each part's share of the tokens. The parts are worked on side by side.
    ///
    /// # Errors
    /// [`TrainError::Diverged`], with the model as it was, where loss or gradient is not finite; the errors of `loss`.
    pub fn update<T: Send, E: Send + From<TrainError>>(
        &mut self,
        batches: &[Batch],
        loss: impl Fn(usize, Tensor<2>, &Weight<2>) -> Result<(Tensor<1>, T), E> + Sync,
        lr: f64,
    ) -> Result<(StepReport, Vec<T>), E> {
        let start = Instant::now();
        let step = self.steps + 1;
        let tokens: usize = batches.iter().map(Batch::tokens).sum();
        let (computing, checkpointing) = (self.computing(), self.gradient_checkpointing);
        let model = &computing;
        let parts = in_parallel(&self.pools, batches.len(), |i| {
            let aux_share = batches[i].tokens() as f64 / tokens as f64;
            let loss = |hidden, head: &Weight<2>| loss(i, hidden, head);
            if checkpointing {
                gradient_checkpointing::forward_backward(model, &batches[i], loss, aux_share)
            } else {
                forward_backward(model, &batches[i], loss, aux_share)
            }
        });
        drop(computing); // the weights have one owner again
        let (mut total, mut aux_loss) = (0.0, 0.0);
        let mut load = Load::new(self.model());
        let mut gradients = Vec::with_capacity(parts.len());
        let mut reports = Vec::with_capacity(parts.len());
        for part in parts {
            let part = part?;
            total += part.loss;
            aux_loss += part.aux_loss;
            load.add(&part.choices);
            gradients.push(part.gradients);
            reports.push(part.report);
        }
        let mut gradients = parameters::sum_gradients(gradients);
        let grad_norm = parameters::global_norm(&gradients);
        if !total.is_finite() || !grad_norm.is_finite() {
            return Err(TrainError::Diverged { step, loss: total, grad_norm }.into());
        }
        let scale = self.optimizer.scale(grad_norm);
        // Taken out, so that every parameter has one owner and is changed where it is.
        let model = self.model.take().expect(PRESENT);
        let optimizer = &mut self.optimizer;
        self.model =
            Some(parameters::update(model, |i, value| optimizer.update(i, lr, scale, value, gradients[i].take())));
        self.steps = step;
        let (expert_load_min, expert_load_max) = load.range();
        let report = StepReport {
            loss: total,
            aux_loss,
            grad_norm,
            tokens,
            expert_load_max,
            expert_load_min,
            seconds: start.elapsed().as_secs_f64(),
        };
        Ok((report, reports))
    }

    /// `f(i, hidden, head)` of every batch under the model as it stands, with the bits that [`Trainer::update`] would see, and
    /// without a backward pass.
    pub fn forward<T: Send>(&self, batches: &[&Batch], f: impl Fn(usize, Tensor<2>, &Weight<2>) -> T + Sync) -> Vec<T> {
        let model = &self.computing();
        in_parallel(&self.pools, batches.len(), |i| {
            let (hidden, head) = if self.gradient_checkpointing {
                gradient_checkpointing::forward(model, batches[i])
            } else {
                let model = parameters::tracked(model);
                (model.forward(batches[i], None, &mut Trace::none()), model.lm_head.weight.value())
            };
            f(i, hidden, &head)
        })
    }

    /// Keeps only what goes into each layer until the backward pass, which then runs every layer again: memory for time.
    pub fn with_gradient_checkpointing(mut self, on: bool) -> Self {
        self.gradient_checkpointing = on;
        self
    }

    /// Computes with matrices rounded to bf16 ([`parameters::in_bf16`]); the model that is trained stays in f32, so that steps
    /// smaller than a bf16 can tell add up.
    pub fn with_bf16(mut self, on: bool) -> Self {
        self.bf16 = on;
        self
    }

    /// The model in the form that it is computed with; what draws responses is made of this one.
    pub fn computing(&self) -> M1 {
        if self.bf16 { parameters::in_bf16(self.model()) } else { self.model().clone() }
    }

    /// Threads, each on a part of its own.
    pub fn pools(&self) -> &[rayon::ThreadPool] {
        &self.pools
    }

    /// The device that the weights are on.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

/// A pool of one thread for each worker: whatever Burn spreads over rayon then stays in that worker's thread.
pub(crate) fn workers(threads: usize) -> Result<Vec<rayon::ThreadPool>, TrainError> {
    let pool = |_| rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let pools = (0..threads.max(1)).map(pool).collect::<Result<Vec<_>, _>>();
    pools.map_err(|e| TrainError::Threads { threads, reason: e.to_string() })
}

/// Runs `job(0..jobs)` on the pools' threads, whoever is free taking the next; the results come in the jobs' order.
pub(crate) fn in_parallel<T: Send>(
    pools: &[rayon::ThreadPool],
    jobs: usize,
    job: impl Fn(usize) -> T + Sync,
) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(jobs));
    // The kernels' threads are shared out: a helper of one worker would take its core from another (measured on two cores: a
    // step of nano at 4 x 512 tokens is 14 % faster so).
    let threads = pool::threads() / pools.len().min(jobs).max(1);
    std::thread::scope(|scope| {
        for worker in pools.iter().take(jobs) {
            scope.spawn(|| {
                worker.install(|| {
                    loop {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        if i >= jobs {
                            break;
                        }
                        let result = pool::with_threads(threads, || job(i));
                        done.lock().unwrap_or_else(|e| e.into_inner()).push((i, result));
                    }
                });
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(|e| e.into_inner());
    done.sort_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, result)| result).collect()
}

/// Forward and backward of `loss(hidden, head)` plus `aux_share` of the router's auxiliary loss.
fn forward_backward<T, E>(
    model: &M1,
    batch: &Batch,
    loss: impl FnOnce(Tensor<2>, &Weight<2>) -> Result<(Tensor<1>, T), E>,
    aux_share: f64,
) -> Result<Passed<T>, E> {
    let model = parameters::tracked(model);
    let mut trace = Trace::router();
    let hidden = model.forward(batch, None, &mut trace);
    let (loss, report) = loss(hidden, &model.lm_head.weight.value())?;
    let aux_loss = router_aux_loss(&trace, model.config()) * aux_share;
    let total = loss.clone() + aux_loss.clone();
    let mut gradients = total.backward();
    Ok(Passed {
        loss: loss.inner().into_scalar::<f32>().into(),
        aux_loss: aux_loss.inner().into_scalar::<f32>().into(),
        report,
        choices: trace.choices,
        gradients: parameters::take_gradients(&model, &mut gradients),
    })
}

/// The examples as a batch that gives hidden states where a token to be learned follows, and these tokens.
///
/// The last token of a row predicts nothing here, so it is not read at all; probabilities are made only where they are
/// wanted, and no matrix of logits is.
fn learned(examples: &[&Example]) -> (Batch, Vec<u32>) {
    let (mut rows, mut offsets, mut next) = (Vec::new(), Vec::new(), Vec::new());
    for example in examples {
        let learned: Vec<usize> = (1..example.ids.len()).filter(|&t| example.loss[t]).collect();
        next.extend(learned.iter().map(|&t| example.ids[t]));
        offsets.push(learned.iter().map(|t| t - 1).collect());
        rows.push(example.ids[..example.ids.len().saturating_sub(1)].to_vec());
    }
    (Batch::new(rows).at(offsets), next)
}

/// The sum of `-ln p(token | before)` over the examples' tokens to be learned, `[1]`.
pub fn cross_entropy_sum(model: &M1, examples: &[&Example], trace: &mut Trace) -> Tensor<1> {
    let (batch, next) = learned(examples);
    let (log_probs, _) = log_prob(model.forward(&batch, None, trace), &model.lm_head.weight.value(), &next, 1.0);
    log_probs.sum().neg()
}

/// How many tokens of an example are to be learned (the first token is never predicted).
pub fn targets(example: &Example) -> usize {
    example.loss.iter().skip(1).filter(|&&l| l).count()
}

/// Splits texts of these lengths into parts of about `micro_tokens` tokens, each of similar lengths, so that attention's
/// padding stays small. Gives the numbers of each part's texts.
pub(crate) fn split(lengths: &[usize], micro_tokens: usize) -> Vec<Vec<usize>> {
    let mut sorted: Vec<usize> = (0..lengths.len()).collect();
    sorted.sort_by_key(|&i| std::cmp::Reverse(lengths[i])); // stable: equal lengths keep their order
    let tokens: usize = lengths.iter().sum();
    let parts = tokens.div_ceil(micro_tokens.max(1)).max(1);
    let mut micros: Vec<Vec<usize>> = vec![Vec::new()];
    let mut seen = 0;
    for i in sorted {
        // The border lies where an equal share ends, so that no part is a small rest.
        if seen >= micros.len() * tokens / parts {
            micros.push(Vec::new());
        }
        seen += lengths[i];
        if let Some(last) = micros.last_mut() {
            last.push(i);
        }
    }
    micros.retain(|m| !m.is_empty());
    micros
}

/// How often each expert of each layer was chosen.
struct Load {
    counts: Vec<Vec<u64>>,
}

impl Load {
    fn new(model: &M1) -> Self {
        let config = model.config();
        Self { counts: vec![vec![0; config.num_local_experts]; config.num_hidden_layers] }
    }

    fn add(&mut self, choices: &[Vec<u32>]) {
        for (counts, chosen) in self.counts.iter_mut().zip(choices) {
            for &expert in chosen {
                counts[expert as usize] += 1;
            }
        }
    }

    /// Lowest and highest share over the fair one, over all layers.
    fn range(&self) -> (f64, f64) {
        let relative = self.counts.iter().flat_map(|counts| {
            let fair = counts.iter().sum::<u64>() as f64 / counts.len() as f64;
            counts.iter().map(move |&c| c as f64 / fair.max(f64::MIN_POSITIVE))
        });
        relative.fold((f64::MAX, 0.0), |(low, high), r| (low.min(r), high.max(r)))
    }
}
