//! Written addition and subtraction, column by column from the right: the steps that several tasks share, so that a
//! model learns them once.
//!
//! ```text
//! 47+58            52-38
//! 7+8+0=15 5       12-8-0=4 4
//! 4+5+1=10 05      05-3-1=1 14
//! =105             =14
//! ```
//! A line of the sum is digit + digit + carry = two digits, then the result so far. A line of the difference has the
//! upper digit with its borrowed ten (1) or without (0), minus digit, minus what was borrowed from it before.

use std::fmt::Write;

/// Decimal digits from the lowest, filled up with zeros to `width`.
fn reversed_digits(mut number: u64, width: usize) -> Vec<u64> {
    (0..width)
        .map(|_| {
            let digit = number % 10;
            number /= 10;
            digit
        })
        .collect()
}

fn width(number: u64) -> usize {
    number.to_string().len()
}

/// The steps of `a + b`, ending in the line `=sum`.
pub(super) fn add(a: u64, b: u64) -> String {
    let columns = width(a).max(width(b));
    let (upper, lower) = (reversed_digits(a, columns), reversed_digits(b, columns));
    let (mut text, mut sofar, mut carry) = (format!("{a}+{b}\n"), String::new(), 0);
    for (x, y) in upper.into_iter().zip(lower) {
        let sum = x + y + carry;
        sofar.insert_str(0, &(sum % 10).to_string());
        let _ = writeln!(text, "{x}+{y}+{carry}={sum:02} {sofar}");
        carry = sum / 10;
    }
    let _ = write!(text, "={}", a + b);
    text
}

/// The steps of `a - b` for a ≥ b, ending in the line `=difference`.
pub(super) fn subtract(a: u64, b: u64) -> String {
    let columns = width(a);
    let (upper, lower) = (reversed_digits(a, columns), reversed_digits(b, columns));
    let (mut text, mut sofar, mut borrowed) = (format!("{a}-{b}\n"), String::new(), 0);
    for (x, y) in upper.into_iter().zip(lower) {
        let ten = u64::from(x < y + borrowed);
        let digit = 10 * ten + x - y - borrowed;
        sofar.insert_str(0, &digit.to_string());
        let _ = writeln!(text, "{ten}{x}-{y}-{borrowed}={digit} {sofar}");
        borrowed = ten;
    }
    let _ = write!(text, "={}", a - b);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_read_as_documented() {
        assert_eq!(add(47, 58), "47+58\n7+8+0=15 5\n4+5+1=10 05\n=105");
        assert_eq!(add(5, 120), "5+120\n5+0+0=05 5\n0+2+0=02 25\n0+1+0=01 125\n=125");
        assert_eq!(subtract(52, 38), "52-38\n12-8-0=4 4\n05-3-1=1 14\n=14");
        assert_eq!(subtract(100, 99), "100-99\n10-9-0=1 1\n10-9-1=0 01\n01-0-1=0 001\n=1");
    }

    #[test]
    fn last_partial_result_is_the_result() {
        for (a, b) in (0..40).map(|i| (i * 7919 % 2003, i * 104_729 % 1009)) {
            let (a, b) = (a.max(b), a.min(b));
            let last =
                |text: &str| text.lines().nth_back(1).unwrap().rsplit(' ').next().unwrap().parse::<u64>().unwrap();
            assert_eq!(last(&subtract(a, b)), a - b);
            let sum = add(a, b);
            assert_eq!((a + b) % 10u64.pow(width(a) as u32), last(&sum));
            assert!(sum.ends_with(&format!("\n={}", a + b)));
        }
    }
}
