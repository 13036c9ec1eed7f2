//! The whole model with the router's auxiliary loss on Burn's autodiff, every kind of weight, against central
//! differences in float64.

use burn::tensor::Device;

#[test]
fn the_whole_model_differentiates() {
    m1_tests::gradients::check(&Device::flex());
}
