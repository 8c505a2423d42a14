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
        }
        assert_eq!(decode("-_-_"), decode("+/+/"));
        for odd in ["a", "a b=", "=a==", "é"] {
            assert_eq!(decode(odd), None, "{odd}");
        }
    }
}
