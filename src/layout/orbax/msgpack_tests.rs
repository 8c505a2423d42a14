use proptest::prelude::*;

use super::*;

fn name(text: &str) -> Key {
    Key::Name(text.to_owned())
}

fn decode(bytes: &[u8]) -> Result<Node, MsgpackError> {
    parse(&Bytes::copy_from_slice(bytes))
}

fn text(text: &str) -> Vec<u8> {
    [&[0xd9, text.len() as u8], text.as_bytes()].concat()
}

/// An ndarray extension.
fn ndarray(kind: u8, shape: &[u8], dtype: &str, data: &[u8]) -> Vec<u8> {
    let payload = [&[0x93, 0x90 | shape.len() as u8], shape, &text(dtype), &[0xc4, data.len() as u8], data].concat();
    [&[0xc7, payload.len() as u8, kind], payload.as_slice()].concat()
}

/// The head of a real file of 0.4.8: an empty dict, list and namedtuple, a list of placeholders, a namedtuple.
fn real() -> Vec<u8> {
    let mut bytes = vec![0x86];
    bytes.extend(b"\xa2ed\x80\xa2el\x90\xa3ent\xc0\xa1l\x92\xb1PLACEHOLDER://l.0\xb1PLACEHOLDER://l.1");
    bytes.extend(b"\xa2lr\xb0PLACEHOLDER://lr\xa2nt\x82\xa2mu\xb3PLACEHOLDER://nt.mu\xa2nu\xb3PLACEHOLDER://nt.nu");
    bytes
}

#[test]
fn a_real_file_is_read() {
    let placeholder = |name: &str| Node::Placeholder(name.to_owned());
    let expected = Node::Map(vec![
        (name("ed"), Node::Map(vec![])),
        (name("el"), Node::List(vec![])),
        (name("ent"), Node::Nil),
        (name("l"), Node::List(vec![placeholder("l.0"), placeholder("l.1")])),
        (name("lr"), placeholder("lr")),
        (name("nt"), Node::Map(vec![(name("mu"), placeholder("nt.mu")), (name("nu"), placeholder("nt.nu"))])),
    ]);
    assert_eq!(decode(&real()), Ok(expected));
}

#[test]
fn every_type_byte_is_read() {
    let cases: &[(&[u8], Node)] = &[
        (&[0x7f], Node::Int(127)),
        (&[0xe0], Node::Int(-32)),
        (&[0xc0], Node::Nil),
        (&[0xc2], Node::Bool(false)),
        (&[0xc3], Node::Bool(true)),
        (&[0xc4, 1, 9], Node::Bytes(Bytes::from_static(&[9]))),
        (&[0xc5, 0, 1, 9], Node::Bytes(Bytes::from_static(&[9]))),
        (&[0xc6, 0, 0, 0, 0], Node::Bytes(Bytes::new())),
        (&[0xca, 0x3f, 0x80, 0, 0], Node::Float(1.0)),
        (&[0xcb, 0xbf, 0xf0, 0, 0, 0, 0, 0, 0], Node::Float(-1.0)),
        (&[0xcc, 0xff], Node::Int(255)),
        (&[0xcd, 1, 0], Node::Int(256)),
        (&[0xce, 0xff, 0xff, 0xff, 0xff], Node::Int(u32::MAX.into())),
        (&[0xcf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], Node::Int(u64::MAX.into())),
        (&[0xd0, 0x80], Node::Int(-128)),
        (&[0xd1, 0x80, 0], Node::Int(i16::MIN.into())),
        (&[0xd2, 0x80, 0, 0, 0], Node::Int(i32::MIN.into())),
        (&[0xd3, 0x80, 0, 0, 0, 0, 0, 0, 0], Node::Int(i64::MIN.into())),
        (&[0xd4, 0x07, 0], Node::Unsupported("msgpack extension type 7".into())),
        (&[0xd6, 0xff, 0, 0, 0, 0], Node::Unsupported("msgpack extension type -1".into())),
        (&[0xc8, 0, 1, 0x09, 0], Node::Unsupported("msgpack extension type 9".into())),
        (&[0xda, 0, 1, b'x'], Node::Str("x".into())),
        (&[0xdb, 0, 0, 0, 1, b'x'], Node::Str("x".into())),
        (&[0xdc, 0, 1, 0xc0], Node::List(vec![Node::Nil])),
        (&[0xdd, 0, 0, 0, 0], Node::List(vec![])),
        (&[0xde, 0, 1, 5, 0xc0], Node::Map(vec![(Key::Int(5), Node::Nil)])),
        (&[0xdf, 0, 0, 0, 1, 0xff, 0xc0], Node::Map(vec![(Key::Int(-1), Node::Nil)])),
    ];
    for (bytes, node) in cases {
        assert_eq!(decode(bytes).as_ref(), Ok(node), "{bytes:x?}");
    }
}

#[test]
fn extensions_are_read_without_copying() {
    let file = Bytes::from(ndarray(1, &[2, 1], "bfloat16", &[1, 2, 3, 4]));
    let Ok(Node::Array(array)) = parse(&file) else { panic!() };
    assert_eq!((array.dtype, array.shape.as_slice(), array.is_scalar), (DType::BFloat16, &[2, 1][..], false));
    assert_eq!(array.data.as_ptr(), file[file.len() - 4..].as_ptr());
    let scalar = decode(&ndarray(3, &[], "int16", &[1, 2])).unwrap();
    assert!(matches!(scalar, Node::Array(InlineArray { is_scalar: true, shape, .. }) if shape.is_empty()));
    assert_eq!(decode(&[0xc7, 3, 2, 0x92, 1, 2]), Ok(Node::Complex { re: 1.0, im: 2.0 }));
    assert_eq!(decode(&[0xc7, 3, 4, 0x92, 1, 0xc0]), Ok(Node::Tuple(vec![Node::Int(1), Node::Nil])));
    assert_eq!(decode(&ndarray(1, &[1], "i4", &[0])), Ok(Node::Unsupported("array of data type `i4`".into())));
}

#[test]
fn chunked_arrays_are_joined_in_numeric_order() {
    let mut file = [&[0x83], text("__msgpack_chunked_array__").as_slice(), &[0xc3]].concat();
    file.extend([text("shape"), [&[0x82], text("0").as_slice(), &[11], &text("1"), &[1]].concat()].concat());
    file.extend([text("chunks"), vec![0x8b]].concat());
    for index in (0..11).rev() {
        file.extend([text(&index.to_string()), ndarray(1, &[1], "int8", &[index])].concat());
    }
    let expected = InlineArray { dtype: DType::Int8, shape: vec![11, 1], is_scalar: false, data: (0..11).collect() };
    assert_eq!(decode(&file), Ok(Node::Array(expected)));
    let gap = String::from_utf8_lossy(&file).replace("\u{1}7", "\u{1}x").into_bytes();
    assert!(decode(&gap).is_err());
}

#[test]
fn t5x_files_are_recognised() {
    let native = [&[0x82], text("version").as_slice(), &[3], &text("optimizer"), &[0x80]].concat();
    assert!(is_t5x(&decode(&native).unwrap()));
    let spec = [&[0x82], text("driver").as_slice(), &text("zarr"), &text("metadata"), &[0x80]].concat();
    assert!(is_t5x(&decode(&[&[0x81], text("w").as_slice(), &spec].concat()).unwrap()));
    assert!(!is_t5x(&decode(&real()).unwrap()));
}

#[test]
fn huge_counts_do_not_allocate() {
    let huge: [&[u8]; 6] = [
        &[0xdd, 0xff, 0xff, 0xff, 0xff],
        &[0xdf, 0xff, 0xff, 0xff, 0xff],
        &[0xdb, 0xff, 0xff, 0xff, 0xff],
        &[0xc6, 0xff, 0xff, 0xff, 0xff],
        &[0xc9, 0xff, 0xff, 0xff, 0xff, 1],
        &[0xdd, 0x7f, 0xff, 0xff, 0xff, 0xdd, 0x7f, 0xff, 0xff, 0xff],
    ];
    for bytes in huge {
        assert!(matches!(decode(bytes).unwrap_err().problem, Problem::Truncated { .. }), "{bytes:x?}");
    }
}

#[test]
fn deep_nesting_is_an_error_not_a_stack_overflow() {
    assert_eq!(decode(&vec![0x91; 1 << 20]).unwrap_err().problem, Problem::Deep);
    // Tuples nest through their payloads.
    let mut nested = vec![0xc0];
    for _ in 0..NESTING_MAX {
        let payload = [&[0x91], nested.as_slice()].concat();
        nested = [&[0xc9], (payload.len() as u32).to_be_bytes().as_slice(), &[4], &payload].concat();
    }
    assert_eq!(decode(&nested).unwrap_err().problem, Problem::Deep);
}

#[test]
fn wrong_values_are_named_with_their_offset() {
    let problem = |bytes: &[u8]| decode(bytes).map_err(|error| (error.offset, error.problem)).unwrap_err();
    assert_eq!(problem(&[]), (0, Problem::Truncated { needed: 1, left: 0 }));
    assert_eq!(problem(&[0xc1]), (0, Problem::Reserved));
    assert_eq!(problem(&[0xc0, 0xc0]), (1, Problem::Trailing(1)));
    assert_eq!(problem(&[0xa1, 0xff]), (1, Problem::Utf8));
    assert_eq!(problem(&[0x81, 0xc0, 0xc0]), (1, Problem::KeyType));
    assert_eq!(problem(&[0x91, 0x82, 1, 2, 1, 2]), (1, Problem::Duplicate(Key::Int(1))));
    let (_, array) = problem(&ndarray(1, &[3], "int16", &[0; 5]));
    assert_eq!(array, Problem::ArrayBytes { dtype: DType::Int16, shape: vec![3], found: 5 });
    // An extent of 2^64 - 1, squared: the product must not wrap.
    let extent = [&[0xcf], [0xff; 8].as_slice()].concat();
    let payload = [&[0x93, 0x92], extent.as_slice(), &extent, &text("int8"), &[0xc4, 1, 0]].concat();
    let (_, array) = problem(&[&[0xc7, payload.len() as u8, 1], payload.as_slice()].concat());
    assert!(matches!(array, Problem::ArrayBytes { .. }));
}

#[test]
fn truncation_at_every_byte_is_an_error() {
    let file = [&[0x92], real().as_slice(), &ndarray(1, &[2], "float32", &[0; 8])].concat();
    assert!(decode(&file).is_ok());
    for end in 0..file.len() {
        assert!(decode(&file[..end]).is_err(), "{end}");
    }
}

proptest! {
    #[test]
    fn any_bytes_return(bytes: Vec<u8>) {
        let _ = decode(&bytes);
    }

    #[test]
    fn a_changed_byte_returns(at in 0..100_usize, byte: u8) {
        let mut file = real();
        if let Some(place) = file.get_mut(at) {
            *place = byte;
        }
        let _ = decode(&file).map(|node| is_t5x(&node));
    }
}
