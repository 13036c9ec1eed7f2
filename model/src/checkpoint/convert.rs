//! Numbers between files and memory: little-endian f32, bf16 and f16, a piece per thread.

use half::{bf16, f16};
use rayon::prelude::*;

/// What weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    Bf16,
    /// 2 bytes.
    F16,
}

impl Stored {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// Numbers that one thread converts at a time: large enough to be worth handing out, small enough to share evenly.
const PIECE: usize = 1 << 18;

/// To f32, exactly. Bytes need no alignment.
pub fn to_f32(bytes: &[u8], from: Stored) -> Vec<f32> {
    match from {
        Stored::F32 => map(bytes, f32::from_le_bytes),
        Stored::Bf16 => map(bytes, |b| bf16::from_le_bytes(b).to_f32()),
        Stored::F16 => map(bytes, |b| f16::from_le_bytes(b).to_f32()),
    }
}

/// To the bits of bf16, rounded to nearest even.
pub fn to_bf16_bits(bytes: &[u8], from: Stored) -> Vec<u16> {
    match from {
        Stored::F32 => map(bytes, |b| bf16::from_f32(f32::from_le_bytes(b)).to_bits()),
        Stored::Bf16 => map(bytes, u16::from_le_bytes),
        Stored::F16 => map(bytes, |b| bf16::from_f32(f16::from_le_bytes(b).to_f32()).to_bits()),
    }
}

fn map<const N: usize, T: Copy + Default + Send>(bytes: &[u8], convert: impl Fn([u8; N]) -> T + Sync) -> Vec<T> {
    let (numbers, _) = bytes.as_chunks::<N>();
    let mut out = vec![T::default(); numbers.len()];
    out.par_chunks_mut(PIECE).zip(numbers.par_chunks(PIECE)).for_each(|(out, numbers)| {
        for (out, number) in out.iter_mut().zip(numbers) {
            *out = convert(*number);
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bf16_and_f16_survives_f32() {
        let bits: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let wide: Vec<u8> = to_f32(&bits, Stored::Bf16).iter().flat_map(|x| x.to_le_bytes()).collect();
        for (bits, back) in (0..=u16::MAX).zip(to_bf16_bits(&wide, Stored::F32)) {
            let nan = bf16::from_bits(bits).is_nan();
            assert!(bits == back || nan && bf16::from_bits(back).is_nan(), "{bits:04x} became {back:04x}");
        }
        let half = to_f32(&bits, Stored::F16);
        assert_eq!((half[0x3c00], half[0xc000], half[1]), (1.0, -2.0, 2f32.powi(-24)));
    }

    #[test]
    fn bf16_rounds_to_nearest_even() {
        let ulp = 2f32.powi(-7);
        for (x, expected) in [
            (1.0 + ulp / 2.0, 1.0),
            (1.0 + 1.5 * ulp, 1.0 + 2.0 * ulp),
            (1.0 + 0.51 * ulp, 1.0 + ulp),
            (-1.0 - 1.5 * ulp, -1.0 - 2.0 * ulp),
            (f32::MAX, f32::INFINITY),
        ] {
            let bits = to_bf16_bits(&x.to_le_bytes(), Stored::F32)[0];
            assert_eq!(bf16::from_bits(bits).to_f32(), expected, "{x}");
        }
    }
}
