//! Base64 of the keys of `_sharding`.

/// Decodes either alphabet (`-_` or `+/`), with or without padding; `None` for anything else.
pub(super) fn decode(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=').as_bytes();
    if text.len() % 4 == 1 {
        return None;
    }
    let mut decoded = Vec::with_capacity(text.len() / 4 * 3 + 2);
    for group in text.chunks(4) {
        let mut bits = 0_u32;
        for &char in group {
            bits = bits << 6 | u32::from(sextet(char)?);
        }
        let missing = 4 - group.len();
        bits <<= 6 * missing;
        let [_, bytes @ ..] = bits.to_be_bytes();
        decoded.extend(bytes.into_iter().take(3 - missing));
    }
    Some(decoded)
}

/// Encodes in the URL-safe alphabet with padding, as Python's `urlsafe_b64encode`.
pub(super) fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0_u32, |bits, &byte| bits << 8 | u32::from(byte)) << (8 * (3 - group.len()));
        for place in 0..4 {
            text.push(match (bits >> (18 - 6 * place)).to_le_bytes()[0] & 63 {
                _ if place > group.len() => '=',
                value @ 0..26 => char::from(b'A' + value),
                value @ 26..52 => char::from(b'a' + value - 26),
                value @ 52..62 => char::from(b'0' + value - 52),
                62 => '-',
                _ => '_',
            });
        }
    }
    text
}

fn sextet(char: u8) -> Option<u8> {
    Some(match char {
        b'A'..=b'Z' => char - b'A',
        b'a'..=b'z' => char - b'a' + 26,
        b'0'..=b'9' => char - b'0' + 52,
        b'-' | b'+' => 62,
        b'_' | b'/' => 63,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_encodings_are_decoded() {
        let cases =
            [("", ""), ("YQ==", "a"), ("YQ", "a"), ("bnQubnU=", "nt.nu"), ("cGFyYW1zLnc=", "params.w"), ("4pyT", "✓")];
        for (encoded, text) in cases {
            assert_eq!(decode(encoded), Some(text.as_bytes().to_vec()));
            assert_eq!(encode(text.as_bytes()).trim_end_matches('='), encoded.trim_end_matches('='));
        }
        assert_eq!(decode("-_-_"), decode("+/+/"));
        for odd in ["a", "a b=", "=a==", "é"] {
            assert_eq!(decode(odd), None, "{odd}");
        }
    }

    proptest::proptest! {
        #[test]
        fn what_is_encoded_is_decoded(bytes: Vec<u8>) {
            let encoded = encode(&bytes);
            proptest::prop_assert_eq!(encoded.len() % 4, 0);
            proptest::prop_assert_eq!(decode(&encoded), Some(bytes));
        }
    }
}
