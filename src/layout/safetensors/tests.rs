use crate::ErrorKind;
use crate::layout::testing::Dir;

use super::*;

/// A file with these one-byte tensors.
fn file(names: &[&str]) -> Vec<u8> {
    let members = names.iter().enumerate();
    let member = |(at, name): (usize, &&str)| {
        format!(r#""{name}":{{"dtype":"U8","shape":[1],"data_offsets":[{at},{}]}}"#, at + 1)
    };
    let json = format!("{{{}}}", members.map(member).collect::<Vec<_>>().join(","));
    [&(json.len() as u64).to_le_bytes(), json.as_bytes(), vec![0; names.len()].as_slice()].concat()
}

fn path(name: &str) -> RelPath {
    RelPath::new(name).unwrap()
}

fn read_source(dir: &Dir, source: Source) -> Result<Vec<File>> {
    dir.run(|ask| async move { read(&ask, &source).await })
}

#[test]
fn a_directory_is_all_its_files_in_two_batches() {
    let dir = Dir::new().file("b.safetensors", file(&["x"])).file("a.safetensors", file(&["y", "z"]));
    let files = read_source(&dir, Source::Dir(vec![path("a.safetensors"), path("b.safetensors")])).unwrap();
    assert_eq!(dir.batches(), 2);
    let names: Vec<_> = files.iter().flat_map(|file| &file.tensors).map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["y", "z", "x"]);
    assert_eq!(files[0].tensors[1].offset, files[0].size - 1);
}

#[test]
fn a_long_header_is_read_in_a_third_batch() {
    let names: Vec<_> = (0..5000).map(|index| format!("layer.{index}.weight")).collect();
    let dir = Dir::new().file("m.safetensors", file(&names.iter().map(String::as_str).collect::<Vec<_>>()));
    let files = read_source(&dir, Source::File(path("m.safetensors"))).unwrap();
    assert_eq!(dir.batches(), 3);
    assert_eq!(files[0].tensors.len(), 5000);
}

#[test]
fn a_tensor_in_two_files_is_refused() {
    let dir = Dir::new().file("a.safetensors", file(&["x"])).file("b.safetensors", file(&["x"]));
    let error = read_source(&dir, Source::Dir(vec![path("a.safetensors"), path("b.safetensors")])).unwrap_err();
    assert_eq!(
        (error.kind(), error.list()),
        (ErrorKind::Corrupt, &["`x` in a.safetensors and b.safetensors".to_owned()][..])
    );
}

#[test]
fn an_index_decides_which_files_are_read() {
    let index = r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#;
    let dir = Dir::new()
        .file("model.safetensors.index.json", index)
        .file("a.safetensors", file(&["x"]))
        .file("b.safetensors", file(&["y"]))
        .file("consolidated.safetensors", file(&["x", "y"]));
    let source = Source::Index(path("model.safetensors.index.json"));
    assert_eq!(read_source(&dir, source.clone()).unwrap().len(), 2);
    let lacking = Dir::new().file("model.safetensors.index.json", index).file("a.safetensors", file(&["x"]));
    let error = read_source(&lacking, source.clone()).unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string()),
        (ErrorKind::NotFound, "no such file in file b.safetensors".to_owned())
    );
    let error = read_source(&lacking.file("b.safetensors", file(&["z"])), source).unwrap_err();
    assert_eq!(error.list(), ["`y` is not in b.safetensors"]);
}

#[test]
fn damage_names_the_file() {
    let mut bytes = file(&["x"]);
    bytes.pop();
    let error = read_source(&Dir::new().file("m.safetensors", bytes), Source::File(path("m.safetensors"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("m.safetensors"), "{error}");
    let empty = Dir::new().file("m.safetensors", "");
    assert_eq!(read_source(&empty, Source::File(path("m.safetensors"))).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn names_tell_the_source() {
    let entry = |name: &str| DirEntry { name: name.to_owned(), kind: EntryKind::File };
    assert_eq!(Source::of_file(&path("a.safetensors")), Some(Source::File(path("a.safetensors"))));
    assert_eq!(Source::of_file(&path("a.npz")), None);
    let index = "diffusion_pytorch_model.safetensors.index.json";
    assert_eq!(Source::of_dir(&[entry(index), entry("a.safetensors")]), Some(Source::Index(path(index))));
    assert_eq!(
        Source::of_dir(&[entry("config.json"), entry("a.safetensors")]),
        Some(Source::Dir(vec![path("a.safetensors")]))
    );
    let link = DirEntry { name: "a.safetensors".into(), kind: EntryKind::Dir };
    assert_eq!(Source::of_dir(&[link]), None);
}
