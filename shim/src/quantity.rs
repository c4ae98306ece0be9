//! Memory sizes in Kubernetes' notation.

/// A size that can't be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QuantityError {
    /// Not a number with a known suffix.
    #[error(
        "{0:?} is not a memory size: write bytes or a number with Ki, Mi, Gi, Ti, k, M, G or T, such as \"256Mi\""
    )]
    Malformed(String),
    /// More than 2^64 bytes.
    #[error("{0:?} is more memory than can be counted")]
    TooLarge(String),
}

const SUFFIXES: [(&str, u128); 9] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("", 1),
];

/// Reads a memory size such as `256Mi`, `1.5Gi` or `268435456`; gives bytes, rounded up.
pub fn parse_bytes(text: &str) -> Result<u64, QuantityError> {
    let malformed = || QuantityError::Malformed(text.chars().take(64).collect());
    let too_large = || QuantityError::TooLarge(text.chars().take(64).collect());

    let (number, unit) = SUFFIXES
        .iter()
        .find_map(|(suffix, unit)| text.strip_suffix(suffix).map(|number| (number, *unit)))
        .ok_or_else(malformed)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let dot_without_digits = number.contains('.') && fraction.is_empty();
    if whole.is_empty() || !digits(whole) || !digits(fraction) || dot_without_digits {
        return Err(malformed());
    }
    if whole.len() > 20 || fraction.len() > 15 {
        return Err(too_large());
    }

    let whole: u128 = whole.parse().map_err(|_| malformed())?;
    let scale = 10u128.pow(fraction.len() as u32);
    let fraction: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| malformed())? };
    // At most 10^20 * 2^40 * 10^15 < 2^128.
    let scaled = whole
        .checked_mul(scale)
        .and_then(|value| value.checked_add(fraction))
        .and_then(|value| value.checked_mul(unit))
        .ok_or_else(too_large)?;
    u64::try_from(scaled.div_ceil(scale)).map_err(|_| too_large())
}

/// Reads a memory size; gives MiB, rounded up.
pub fn parse_mib(text: &str) -> Result<u32, QuantityError> {
    let mib = parse_bytes(text)?.div_ceil(1 << 20);
    u32::try_from(mib).map_err(|_| QuantityError::TooLarge(text.chars().take(64).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubernetes_sizes_are_read() {
        let cases = [
            ("0", 0),
            ("268435456", 268_435_456),
            ("256Mi", 256 << 20),
            ("1.5Gi", 3 << 29),
            ("128k", 128_000),
            ("1G", 1_000_000_000),
            ("0.5Ki", 512),
            ("0.0001Ki", 1),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn mebibytes_are_rounded_up() {
        assert_eq!(parse_mib("256Mi"), Ok(256));
        assert_eq!(parse_mib("1"), Ok(1));
        assert_eq!(parse_mib("100M"), Ok(96));
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "", " 256Mi", "256Mi ", "256 Mi", "Mi", "-1", "+1", "1e3", "0x10", "256MB", "256mi", "1..5Gi",
            "1.Gi", ".5Gi", "500m", "١٢", "1,5Gi",
        ] {
            assert!(matches!(parse_bytes(text), Err(QuantityError::Malformed(_))), "{text:?}");
        }
        for text in ["99999999999999999999Ti", "999999999999999999999", "18446744073709551616"] {
            assert!(matches!(parse_bytes(text), Err(QuantityError::TooLarge(_))), "{text:?}");
        }
        assert!(matches!(parse_mib("16777216Ti"), Err(QuantityError::TooLarge(_))));
    }
}
