//! Numbers between files and memory: little-endian f32, bf16 and f16.

use half::{bf16, f16};

/// What numbers are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Number {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    Bf16,
    /// 2 bytes.
    F16,
}

impl Number {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// To f32, exactly. Bytes need no alignment; there are as many numbers as `out` has.
pub fn widen(bytes: &[u8], from: Number, out: &mut [f32]) {
    match from {
        Number::F32 => map(bytes, out, f32::from_le_bytes),
        Number::Bf16 => map(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
        Number::F16 => map(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
    }
}

/// To the bits of bf16, rounded to nearest even.
pub fn narrow(x: &[f32], out: &mut [u16]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = bf16::from_f32(*x).to_bits();
    }
}

/// The bits of 2-byte numbers.
pub fn bits(bytes: &[u8], out: &mut [u16]) {
    map(bytes, out, u16::from_le_bytes);
}

fn map<const N: usize, T>(bytes: &[u8], out: &mut [T], convert: impl Fn([u8; N]) -> T) {
    let (numbers, rest) = bytes.as_chunks::<N>();
    assert!(rest.is_empty() && numbers.len() == out.len(), "{} bytes for {} numbers", bytes.len(), out.len());
    for (out, number) in out.iter_mut().zip(numbers) {
        *out = convert(*number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bf16_and_f16_survives_f32() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let (mut wide, mut back) = (vec![0f32; 1 << 16], vec![0u16; 1 << 16]);
        widen(&bytes, Number::Bf16, &mut wide);
        narrow(&wide, &mut back);
        for (bits, back) in (0..=u16::MAX).zip(back) {
            let nan = bf16::from_bits(bits).is_nan();
            assert!(bits == back || nan && bf16::from_bits(back).is_nan(), "{bits:04x} became {back:04x}");
        }
        widen(&bytes, Number::F16, &mut wide);
        assert_eq!((wide[0x3c00], wide[0xc000], wide[1]), (1.0, -2.0, 2f32.powi(-24)));
        let mut plain = vec![0u16; 1 << 16];
        bits(&bytes, &mut plain);
        assert!((0..=u16::MAX).eq(plain));
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
            let mut bits = [0];
            narrow(&[x], &mut bits);
            assert_eq!(bf16::from_bits(bits[0]).to_f32(), expected, "{x}");
        }
    }
}
