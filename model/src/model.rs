//! The whole model: one forward for generation and training; only the cache handed in differs.

use burn::module::Module;
use burn::tensor::{Device, Tensor, activation::softmax};
use m1_kernels::base::packed::PackError;
use m1_kernels::rotary::Rotation;

use crate::batch::{Batch, Layout, ints};
use crate::cache::{Cache, LayerCache};
use crate::checkpoint::{Slot, WeightDtype, slots};
use crate::config::ModelConfig;
use crate::decoder_layer::{Attention, DecoderLayer};
use crate::layers::{Embedding, Linear, RmsNorm, Stream};
use crate::trace::Trace;

/// The stack of layers, as the checkpoint's `model.` prefix holds it.
#[derive(Module, Debug)]
pub struct Decoder {
    /// `[vocab, hidden]`.
    pub embed_tokens: Embedding,
    /// All layers, first to last.
    pub layers: Vec<DecoderLayer>,
    /// The final norm.
    pub norm: RmsNorm,
}

/// MiniMax-M1 with its language-model head.
#[derive(Module, Debug)]
pub struct M1 {
    /// Everything below the head.
    pub model: Decoder,
    /// `[vocab, hidden]`; its product is always taken in f32.
    pub lm_head: Linear,
    #[module(skip)]
    config: ModelConfig,
    #[module(skip)]
    kv_dtype: WeightDtype,
}

impl M1 {
    /// Fresh random weights, made when first used (a loader replaces them unmade).
    ///
    /// The draws come from the device's generator: `device.seed(n)`, then `materialize()`, makes them repeatable.
    pub fn new(config: &ModelConfig, device: &Device) -> Self {
        Self {
            model: Decoder {
                embed_tokens: Embedding::new(config.vocab_size, config.hidden_size, device),
                layers: (0..config.num_hidden_layers).map(|i| DecoderLayer::new(config, i, device)).collect(),
                norm: RmsNorm::new(config.hidden_size, config.rms_norm_eps, device),
            },
            // Small: an untrained model should call every token equally likely.
            lm_head: Linear::new(config.hidden_size, config.vocab_size, 0.2, device),
            config: config.clone(),
            kv_dtype: WeightDtype::F32,
        }
    }

    /// The same model for inference on the CPU: every matrix packed in the format of its dtype, the router and the rest
    /// as they are. After an update of the weights a new one is needed.
    ///
    /// # Errors
    /// As [`m1_kernels::base::packed::Packed::pack`].
    pub fn packed(&self) -> Result<Self, PackError> {
        let mut model = self.clone();
        for (_, slot) in slots(&mut model) {
            match slot {
                Slot::Matrix(weight) => *weight = weight.packed()?,
                Slot::Experts(weight) => *weight = weight.packed()?,
                Slot::Norm(_) | Slot::Table(_) => {}
            }
        }
        Ok(model)
    }

    /// Bytes of all weights as they are held; the embedding's, where it stays in its file, as they are there.
    pub fn weight_bytes(&self) -> u64 {
        self.sum_bytes(|bytes| bytes, |bytes| bytes)
    }

    /// Bytes of weights that a decode step of one token reads: everything but the experts that it does not visit and the
    /// embedding's other rows.
    pub fn token_bytes(&self) -> u64 {
        let (k, experts) = (self.config.num_experts_per_tok as u64, self.config.num_local_experts as u64);
        let vocab = self.config.vocab_size as u64;
        self.sum_bytes(|table| table / vocab, |stack| stack / experts * k)
    }

    fn sum_bytes(&self, of_table: impl Fn(u64) -> u64, of_experts: impl Fn(u64) -> u64) -> u64 {
        let mut model = self.clone(); // shares every weight
        let bytes = |(_, slot)| match slot {
            Slot::Norm(param) => 4 * param.lazy_shape().num_elements() as u64,
            Slot::Matrix(weight) => weight.bytes(),
            Slot::Table(table) => of_table(table.bytes()),
            Slot::Experts(weight) => of_experts(weight.bytes()),
        };
        slots(&mut model).into_iter().map(bytes).sum()
    }

    /// What the matrices are held in, in words: `bf16`, or `bf16, experts int8`.
    pub fn form(&self) -> String {
        let layer = &self.model.layers[0];
        let attention = match &layer.self_attn {
            Attention::Lightning(attention) => attention.out_proj.weight.form(),
            Attention::Softmax(attention) => attention.o_proj.weight.form(),
        };
        match layer.block_sparse_moe.w1.form() {
            experts if experts == attention => attention.into(),
            experts => format!("{attention}, experts {experts}"),
        }
    }

    /// The configuration the model was made for.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// In what [`Cache::new`] keeps this model's keys and values: f32, unless it was loaded with something else.
    pub fn kv_dtype(&self) -> WeightDtype {
        self.kv_dtype
    }

    /// The same model with keys and values kept in `kv_dtype`.
    pub fn with_kv_dtype(self, kv_dtype: WeightDtype) -> Self {
        Self { kv_dtype, ..self }
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.model.norm.weight.lazy_device()
    }

    /// Runs new tokens through all layers and returns the hidden states asked for by the batch, after the final norm:
    /// `[outputs, hidden]`, row after row.
    ///
    /// With a cache each row continues from its own depth, and the cache then holds the new tokens too. Ids must be
    /// below `vocab_size`.
    ///
    /// # Panics
    /// If the cache has another number of rows or an id is outside the vocabulary.
    pub fn forward(&self, batch: &Batch, mut cache: Option<&mut Cache>, trace: &mut Trace) -> Tensor<2> {
        if let Some(cache) = &cache {
            assert_eq!(cache.rows(), batch.rows().len(), "the batch needs as many rows as the cache");
        }
        if batch.tokens() == 0 {
            return Tensor::zeros([0, self.config.hidden_size], &self.device());
        }
        let past: Vec<usize> = match &cache {
            Some(cache) => (0..cache.rows()).map(|row| cache.len(row)).collect(),
            None => vec![0; batch.rows().len()],
        };
        let places = Places::new(batch, &past, &self.config, &self.device());
        let mut x = self.embed(batch);
        for (i, layer) in self.model.layers.iter().enumerate() {
            trace.saw_hidden(|| x.clone().sum());
            x = places.through(layer, x, cache.as_deref_mut().map(|c| c.layer_mut(i)), trace);
        }
        if let Some(cache) = cache {
            cache.advance(batch.rows());
        }
        self.finish(x, batch, trace)
    }

    /// The embeddings of all tokens, row after row: where [`M1::forward`] begins.
    ///
    /// # Panics
    /// If an id is outside the vocabulary.
    pub fn embed(&self, batch: &Batch) -> Stream {
        let ids = batch.rows().iter().flatten().map(|&id| {
            assert!((id as usize) < self.config.vocab_size, "token id {id} is outside the vocabulary");
            id as i32
        });
        self.model.embed_tokens.forward(ids.collect(), &self.device()).into()
    }

    /// The hidden states that the batch asks for, after the final norm, from what the last layer gives: where
    /// [`M1::forward`] ends.
    pub fn finish(&self, x: Stream, batch: &Batch, trace: &mut Trace) -> Tensor<2> {
        let wanted = batch.wanted();
        if wanted.as_ref().is_some_and(Vec::is_empty) {
            return Tensor::zeros([0, self.config.hidden_size], &self.device());
        }
        let x = match wanted {
            Some(wanted) => x.select(ints(wanted.into_iter().map(|i| i as i32).collect(), &self.device())),
            None => x,
        };
        let (_, x) = self.model.norm.forward_stream(x);
        trace.saw_hidden(|| x.clone());
        x
    }

    /// Logits `[n, vocab]` of hidden states `[n, hidden]`, in f32 from the head's weights as stored.
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        if hidden.dims()[0] == 0 {
            return Tensor::zeros([0, self.config.vocab_size], &hidden.device());
        }
        self.lm_head.forward_f32(hidden)
    }
}

/// Where a batch's tokens stand: what every layer of one pass is told.
#[derive(Debug)]
pub struct Places {
    layout: Layout,
    rotation: Rotation,
}

impl Places {
    /// Tokens of `batch`, `past[i]` tokens after the beginning of row i.
    pub fn new(batch: &Batch, past: &[usize], config: &ModelConfig, device: &Device) -> Self {
        let layout = Layout::new(batch, past, device);
        let rotation = Rotation::new(&layout.positions, config.rotary_dim, config.rope_theta, device);
        Self { layout, rotation }
    }

    /// Takes the tokens through one layer, whose cache is its own of that number.
    ///
    /// # Panics
    /// If `cache` is of the other kind of attention.
    pub fn through(
        &self,
        layer: &DecoderLayer,
        x: Stream,
        cache: Option<&mut LayerCache>,
        trace: &mut Trace,
    ) -> Stream {
        layer.forward(x, &self.layout, &self.rotation, cache, trace)
    }
}

/// The router's auxiliary loss over all layers together, times its coefficient:
/// `E · Σ_{k,e} mean(onehot_{k,e}) · mean(prob_e) · router_aux_loss_coef`.
///
/// The trace must come from a forward pass with [`Trace::router`]. It is smallest, `k · coefficient`, when every expert gets the same share.
pub fn router_aux_loss(trace: &Trace, config: &ModelConfig) -> Tensor<1> {
    let experts = config.num_local_experts;
    let logits = Tensor::cat(trace.router_logits.clone(), 0);
    let load = router_load(&trace.choices, experts, logits.dims()[0]);
    let load = Tensor::<1>::from_floats(load.as_slice(), &logits.device());
    let probability: Tensor<1> = softmax(logits, 1).mean_dim(0).squeeze_dim(0);
    (probability * load).sum().mul_scalar(experts as f64 * config.router_aux_loss_coef)
}

/// How often each expert was chosen for each of `rows` routed rows (tokens × layers), over all layers.
pub fn router_load(choices: &[Vec<u32>], experts: usize, rows: usize) -> Vec<f32> {
    let mut load = vec![0f32; experts];
    for &expert in choices.iter().flatten() {
        load[expert as usize] += 1.0 / rows as f32;
    }
    load
}
