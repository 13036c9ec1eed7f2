//! What training and tests want to see of a forward pass, and may put in.

use burn::tensor::Tensor;
use m1_kernels::experts::Choices;

/// Collects router decisions and hidden states, or replays earlier decisions. `Trace::none()` costs nothing.
#[derive(Debug, Default, Clone)]
pub struct Trace {
    want_router: bool,
    want_hidden: bool,
    replay: Option<Vec<Vec<u32>>>,
    /// Router logits of each layer, `[tokens, experts]` f32, if asked for by [`Trace::router`].
    pub router_logits: Vec<Tensor<2>>,
    /// Chosen experts of each layer, `token · k + rank`, if asked for.
    pub choices: Vec<Vec<u32>>,
    /// The input of every layer and, last, the output of the final norm, `[tokens, hidden]`, if asked for by
    /// [`Trace::hidden`].
    pub hidden: Vec<Tensor<2>>,
}

impl Trace {
    /// Sees nothing, changes nothing.
    pub fn none() -> Self {
        Self::default()
    }

    /// Collects router logits and choices.
    pub fn router() -> Self {
        Self { want_router: true, ..Self::default() }
    }

    /// Collects hidden states as well as what the router did.
    pub fn hidden() -> Self {
        Self { want_router: true, want_hidden: true, ..Self::default() }
    }

    /// Takes the expert choices of an earlier pass over the same tokens, layer by layer, instead of the router's.
    pub fn replaying(mut self, choices: Vec<Vec<u32>>) -> Self {
        self.replay = Some(choices);
        self
    }

    pub(crate) fn replay(&self, layer: usize) -> Option<&[u32]> {
        self.replay.as_ref().map(|layers| layers[layer].as_slice())
    }

    pub(crate) fn saw_router(&mut self, logits: &Tensor<2>, choices: &Choices) {
        if self.want_router {
            self.router_logits.push(logits.clone());
            self.choices.push(choices.host().to_vec());
        }
    }

    pub(crate) fn saw_hidden(&mut self, x: impl FnOnce() -> Tensor<2>) {
        if self.want_hidden {
            self.hidden.push(x());
        }
    }
}
