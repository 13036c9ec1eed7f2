//! A model's parameters as a flat list of rank-1 tensors, in the order in which the module visits them.
//!
//! Different here: gradients, clipping, the optimizer and its file all work on this one list, so that none of them
//! needs to know ranks or Burn's parameter ids (which are drawn anew at every load and would orphan saved moments).

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Gradients, Tensor};
use m1_kernels::adamw::sum_of_squares;

/// What a parameter is called and whether it is a matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterInfo {
    /// The module path, joined by dots; stable for a given configuration.
    pub path: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// The parameters' names and shapes.
pub fn infos<M: Module>(model: &M) -> Vec<ParameterInfo> {
    struct Infos(Vec<String>, Vec<ParameterInfo>);
    impl ModuleVisitor for Infos {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.0.push(name.to_owned());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1.push(ParameterInfo { path: self.0.join("."), shape: param.val().dims().to_vec() });
        }
    }
    let mut visitor = Infos(Vec::new(), Vec::new());
    model.visit(&mut visitor);
    visitor.1
}

/// The parameters' values, flattened, without autodiff; they share the model's storage.
pub fn values<M: Module>(model: &M) -> Vec<Tensor<1>> {
    struct Values(Vec<Tensor<1>>);
    impl ModuleVisitor for Values {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.push(param.val().inner().flatten(0, D - 1));
        }
    }
    let mut visitor = Values(Vec::new());
    model.visit(&mut visitor);
    visitor.0
}

/// The model with every value, flattened, replaced by `new(index, value)`, in the order of [`values`]. A value that only
/// this model holds comes as its buffer's one owner, so that it can be changed where it is.
///
/// # Panics
/// If a new value has another number of elements.
pub fn update<M: Module>(model: M, new: impl FnMut(usize, Tensor<1>) -> Tensor<1>) -> M {
    struct Update<F>(usize, F);
    impl<F: FnMut(usize, Tensor<1>) -> Tensor<1>> ModuleMapper for Update<F> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let index = self.0;
            self.0 += 1;
            param.map(|old| {
                let shape = old.shape();
                (self.1)(index, old.flatten(0, D - 1)).reshape(shape)
            })
        }
    }
    model.map(&mut Update(0, new))
}

/// A copy of the model whose parameters are fresh leaves of an autodiff graph, sharing the values' storage.
///
/// Fresh, because Burn keeps graphs that share a node behind one lock: with leaves of their own, two threads go
/// through forward and backward side by side.
pub fn tracked<M: Module>(model: &M) -> M {
    struct Track;
    impl ModuleMapper for Track {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let (id, value, _) = param.consume();
            Param::initialized(id, value.inner().autodiff().require_grad())
        }
    }
    model.clone().map(&mut Track)
}

/// A copy to compute with whose matrices are rounded to bf16: all but the routers and the head, which M1 keeps in f32 in
/// training and generation alike (arXiv 2506.13585). The model itself stays as the masters that an optimizer changes.
pub fn in_bf16<M: Module>(model: &M) -> M {
    struct Round(Vec<String>);
    impl ModuleMapper for Round {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.0.push(name.to_owned());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.0.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let path = self.0.join(".");
            let stays = D < 2 || path.contains("block_sparse_moe.gate") || path.contains("lm_head");
            let (id, value, _) = param.consume();
            Param::initialized(id, if stays { value } else { value.cast(DType::BF16) })
        }
    }
    model.clone().map(&mut Round(Vec::new()))
}

/// Takes the gradients of a [`tracked`] model, flattened and in f32; none for a parameter that the loss does not depend
/// on (an expert that no token was sent to).
pub fn take_gradients<M: Module>(model: &M, gradients: &mut Gradients) -> Vec<Option<Tensor<1>>> {
    struct Take<'a>(&'a mut Gradients, Vec<Option<Tensor<1>>>);
    impl ModuleVisitor for Take<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let gradient = param.val().grad_remove(self.0);
            self.1.push(gradient.map(|g| {
                let g = g.flatten(0, D - 1);
                if g.dtype() == DType::F32 { g } else { g.cast(DType::F32) }
            }));
        }
    }
    let mut visitor = Take(gradients, Vec::new());
    model.visit(&mut visitor);
    visitor.1
}

/// Sums lists of gradients in their order, so that the result does not depend on which thread was first.
pub fn sum_gradients(parts: Vec<Vec<Option<Tensor<1>>>>) -> Vec<Option<Tensor<1>>> {
    let mut parts = parts.into_iter();
    let mut total = parts.next().unwrap_or_default();
    for part in parts {
        for (sum, new) in total.iter_mut().zip(part) {
            *sum = match (sum.take(), new) {
                (Some(a), Some(b)) => Some(a + b),
                (a, b) => a.or(b),
            };
        }
    }
    total
}

/// The Euclidean norm over all gradients together; one read from the device.
pub fn global_norm(gradients: &[Option<Tensor<1>>]) -> f64 {
    let squares: Vec<Tensor<1>> = gradients.iter().flatten().map(|g| sum_of_squares(g.clone())).collect();
    if squares.is_empty() {
        return 0.0;
    }
    let squares = Tensor::cat(squares, 0).into_data();
    squares.iter::<f64>().sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[derive(Module, Debug)]
    struct Two {
        a: Param<Tensor<2>>,
        b: Param<Tensor<1>>,
        unused: Param<Tensor<1>>,
    }

    fn two() -> Two {
        let device = Device::flex();
        Two {
            a: Param::from_data([[1.0f32, 2.0], [3.0, 4.0]], &device),
            b: Param::from_data([10.0f32, 20.0], &device),
            unused: Param::from_data([5.0f32], &device),
        }
    }

    fn host(tensor: Tensor<1>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    #[test]
    fn names_and_values_in_one_order() {
        let infos = infos(&two());
        assert_eq!(infos[0].path, "a");
        assert_eq!(infos[0].shape, [2, 2]);
        assert_eq!(infos[1].path, "b");
        let values: Vec<_> = values(&two()).into_iter().map(host).collect();
        assert_eq!(values, [vec![1., 2., 3., 4.], vec![10., 20.], vec![5.]]);
    }

    #[test]
    fn values_can_be_replaced() {
        let mut seen = Vec::new();
        let model = update(two(), |i, value| {
            seen.push((i, value.dims()[0]));
            value * 2.0
        });
        assert_eq!(seen, [(0, 4), (1, 2), (2, 1)]);
        assert_eq!(model.a.val().dims(), [2, 2]);
        assert_eq!(host(model.b.val()), [20.0, 40.0]);
    }

    #[test]
    fn gradients_arrive_in_the_same_order_and_an_unused_parameter_has_none() {
        let model = tracked(&two());
        // f = sum(a) + 3 * sum(b^2): df/da = 1, df/db = 6 b
        let loss = model.a.val().sum() + model.b.val().square().sum() * 3.0;
        let mut gradients = loss.backward();
        let taken = take_gradients(&model, &mut gradients);
        assert!(taken[2].is_none());
        let norm = global_norm(&taken);
        // 4 ones, 60 and 120
        assert!((norm - (4.0f64 + 3600.0 + 14400.0).sqrt()).abs() < 1e-4);
        let summed = sum_gradients(vec![taken.clone(), taken]);
        assert_eq!(host(summed[1].clone().unwrap()), [120.0, 240.0]);
        assert!(summed[2].is_none());
    }
}
