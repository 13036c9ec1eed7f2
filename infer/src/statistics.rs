//! What repeated measurements come to.

/// The mean.
pub fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

/// Standard deviation of a sample (n - 1); 0 for a single value or none.
pub fn deviation(x: &[f64]) -> f64 {
    let mean = mean(x);
    let squares: f64 = x.iter().map(|x| (x - mean).powi(2)).sum();
    (squares / x.len().saturating_sub(1).max(1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_sample() {
        assert_eq!((mean(&[2.0, 4.0, 9.0]), deviation(&[2.0, 4.0, 9.0])), (5.0, 13f64.sqrt()));
        assert_eq!((deviation(&[3.0]), deviation(&[])), (0.0, 0.0));
    }
}
