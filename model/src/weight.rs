//! What a module holds of its weights: a parameter on a device, or a constant made for inference.
//!
//! A constant has no place in the module tree that Burn's visitors walk: they see no parameter there, and mappers hand
//! it on. So optimizers, devices and autodiff need not know that packed and quantized weights exist.

use std::sync::Arc;

use burn::module::{
    Content, Devices, Initializer, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param,
};
use burn::tensor::{DType, Device, Tensor, TensorData};
use m1_kernels::base::packed::{Format, PackError, Packed};
use m1_kernels::linear::{self, Quantized};

use crate::checkpoint::Rows;

/// A weight of rank `D`: a parameter, or a constant of type `C`.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // one a matrix
pub enum Held<const D: usize, C> {
    /// f32 or bf16 on any device; what training works on.
    Tensor(Param<Tensor<D>>),
    /// For inference only.
    Constant(C),
}

/// A matrix `[out, in]` (`D` = 2) or the stacked matrices of a layer's experts `[experts, out, in]` (`D` = 3).
pub type Weight<const D: usize> = Held<D, Constant>;

/// Matrices that are not trained, in the form that products read.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // one a matrix
pub enum Constant {
    /// On the CPU.
    Packed(Packed),
    /// On another device.
    Quantized(Quantized),
}

/// The embedding's rows `[vocab, hidden]`; as a constant they stay in the checkpoint's file until they are asked for.
pub type Table = Held<2, FileTable>;

/// Rows in a checkpoint's file, and the dtype that they get.
#[derive(Debug, Clone)]
pub struct FileTable {
    /// Where they are.
    pub rows: Arc<Rows>,
    /// f32 or bf16.
    pub dtype: DType,
}

impl Constant {
    fn format(&self) -> Format {
        match self {
            Self::Packed(packed) => packed.format(),
            Self::Quantized(quantized) => quantized.format(),
        }
    }

    /// Outputs and inputs of each matrix.
    pub(crate) fn shape(&self) -> [usize; 2] {
        match self {
            Self::Packed(packed) => [packed.out(), packed.input()],
            Self::Quantized(quantized) => [quantized.dims()[1], quantized.dims()[2]],
        }
    }

    /// Matrix `matrix` on the CPU: where to look for it, and its number there.
    pub(crate) fn on_cpu(&self, matrix: usize) -> (Packed, usize) {
        match self {
            Self::Packed(packed) => (packed.clone(), matrix),
            Self::Quantized(quantized) => (quantized.packed(matrix), 0),
        }
    }
}

impl<const D: usize, C> Held<D, C> {
    /// A normal distribution with this deviation, drawn when first used.
    pub fn normal(std: f64, shape: [usize; D], device: &Device) -> Self {
        Self::Tensor(Initializer::Normal { mean: 0.0, std }.init(shape, device))
    }

    /// The parameter; none if the weight is a constant.
    pub fn param(&self) -> Option<&Param<Tensor<D>>> {
        match self {
            Self::Tensor(param) => Some(param),
            Self::Constant(_) => None,
        }
    }

    /// The parameter's tensor, to train or to look at.
    ///
    /// # Panics
    /// If the weight is a constant: the model was loaded for inference (`LoadOptions::tensors` is for training).
    pub fn val(&self) -> Tensor<D> {
        self.param().expect("a weight that is a tensor, not packed for inference").val()
    }
}

impl<const D: usize> Weight<D> {
    /// Bytes in memory.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Tensor(param) => tensor_bytes(param),
            Self::Constant(Constant::Packed(packed)) => packed.bytes() as u64,
            Self::Constant(Constant::Quantized(quantized)) => quantized.bytes() as u64,
        }
    }

    /// What it is held in: `f32`, `bf16`, `int8` or `int4`.
    pub fn form(&self) -> &'static str {
        let format = match self {
            Self::Tensor(param) if param.is_initialized() && param.val().dtype() == DType::BF16 => Format::Bf16,
            Self::Tensor(_) => Format::F32,
            Self::Constant(constant) => constant.format(),
        };
        match format {
            Format::F32 => "f32",
            Format::Bf16 => "bf16",
            Format::Int8 { .. } => "int8",
            Format::Int4 { .. } => "int4",
        }
    }

    /// What the operations take.
    pub fn value(&self) -> linear::Weight<D> {
        match self {
            Self::Tensor(param) => linear::Weight::Tensor(param.val()),
            Self::Constant(Constant::Packed(packed)) => linear::Weight::Packed(packed.clone()),
            Self::Constant(Constant::Quantized(quantized)) => linear::Weight::Quantized(quantized.clone()),
        }
    }

    /// Packs a parameter on the CPU in the format of its dtype; a constant stays as it is.
    ///
    /// # Errors
    /// As [`Packed::pack`].
    pub fn packed(&self) -> Result<Self, PackError> {
        let Self::Tensor(param) = self else {
            return Ok(self.clone());
        };
        let tensor = param.val();
        let format = if tensor.dtype() == DType::BF16 { Format::Bf16 } else { Format::F32 };
        let dims = tensor.dims();
        let (count, out, input) = (dims[..D - 2].iter().product(), dims[D - 2], dims[D - 1]);
        let data: TensorData = tensor.into_data().convert::<f32>();
        let values: &[f32] = data.as_slice().expect("converted to f32");
        let row = |matrix: usize, row: usize, buf: &mut [f32]| {
            buf.copy_from_slice(&values[(matrix * out + row) * input..][..input]);
        };
        Ok(Self::Constant(Constant::Packed(Packed::pack(format, count, out, input, &row)?)))
    }
}

impl Table {
    /// Of the rows, as they come to the first layer.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Tensor(param) => param.val().dtype(),
            Self::Constant(table) => table.dtype,
        }
    }

    /// Bytes in memory, or of the file where the rows lie.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Tensor(param) => tensor_bytes(param),
            Self::Constant(table) => table.rows.bytes(),
        }
    }
}

fn tensor_bytes<const D: usize>(param: &Param<Tensor<D>>) -> u64 {
    // What was never used is not drawn for this; it will be f32.
    let size = if param.is_initialized() { param.val().dtype().size() } else { 4 };
    (param.lazy_shape().num_elements() * size) as u64
}

impl<const D: usize, C: Clone + Send + std::fmt::Debug> Module for Held<D, C> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        match self {
            Self::Tensor(param) => param.collect_devices(devices),
            Self::Constant(_) => devices,
        }
    }

    fn fork(self, device: &Device) -> Self {
        self.map_tensor(|param| param.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        self.map_tensor(|param| param.to_device(device))
    }

    fn train(self) -> Self {
        self.map_tensor(Module::train)
    }

    fn valid(&self) -> Self {
        self.clone().map_tensor(|param| param.valid())
    }

    fn materialize(self) -> Self {
        self.map_tensor(Module::materialize)
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        if let Self::Tensor(param) = self {
            param.visit(visitor);
        }
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        self.map_tensor(|param| Module::map(param, mapper))
    }
}

impl<const D: usize, C> Held<D, C> {
    fn map_tensor(self, f: impl FnOnce(Param<Tensor<D>>) -> Param<Tensor<D>>) -> Self {
        match self {
            Self::Tensor(param) => Self::Tensor(f(param)),
            constant => constant,
        }
    }
}

impl<const D: usize, C: std::fmt::Debug> ModuleDisplayDefault for Held<D, C> {
    fn content(&self, content: Content) -> Option<Content> {
        match self {
            Self::Tensor(param) => param.content(content),
            Self::Constant(constant) => content.add_formatted(&format!("{constant:?}")).optional(),
        }
    }
}

impl<const D: usize, C: std::fmt::Debug> ModuleDisplay for Held<D, C> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Module, Debug)]
    struct Both {
        tensor: Weight<2>,
        constant: Weight<3>,
    }

    struct Count(usize);

    impl ModuleVisitor for Count {
        fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {
            self.0 += 1;
        }
    }

    #[test]
    fn visitors_and_mappers_pass_a_constant_by() {
        let device = Device::flex();
        let stack = Weight::<3>::normal(1.0, [2, 3, 4], &device);
        let both = Both { tensor: Weight::normal(1.0, [3, 4], &device), constant: stack.packed().unwrap() };
        let mut count = Count(0);
        both.visit(&mut count);
        assert_eq!(count.0, 1);
        assert_eq!(Module::num_params(&both), 12);
        let both = both.train().valid().no_grad();
        assert!(both.tensor.param().is_some() && both.constant.param().is_none());
        assert_eq!(both.constant.value().dims(), [2, 3, 4]);
        assert!(!format!("{both}").is_empty());
    }

    #[test]
    fn packing_keeps_every_bit() {
        let device = Device::flex();
        for dtype in [DType::F32, DType::BF16] {
            let tensor = Tensor::<3>::random([3, 5, 7], burn::tensor::Distribution::Default, &device).cast(dtype);
            let weight: Weight<3> = Held::Tensor(Param::from_tensor(tensor.clone()));
            let Held::Constant(Constant::Packed(packed)) = weight.packed().unwrap() else { panic!("packed") };
            assert_eq!(packed.format(), if dtype == DType::F32 { Format::F32 } else { Format::Bf16 });
            let mut rows = vec![0f32; 3 * 5 * 7];
            for (i, buf) in rows.chunks_mut(7).enumerate() {
                packed.row(i / 5, i % 5, buf);
            }
            assert_eq!(rows, tensor.into_data().convert::<f32>().try_to_vec::<f32>().unwrap());
        }
    }
}
