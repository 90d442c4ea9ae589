//! What is in the place of a model's files is named in one line, at once, whatever it is.

use crate::common::command::{fails, path, succeeds};
use crate::common::golden::copied;
use std::fs;
use std::path::Path;

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

#[test]
fn files_in_the_place_of_weights_are_named() {
    let folder = copied("tiny-sd1");
    let (whole, alone) = (path(&folder, ""), path(&folder, "m.safetensors"));
    succeeds(&["inspect", &whole]);
    for (bytes, words) in [
        (&b"<!DOCTYPE html><html><body>Sign in</body></html>"[..], "is a web page (HTML), not a safetensors file"),
        (b"{\"error\":\"Access to model is restricted\"}", "is JSON text"),
        (b"Entry not found", "is text"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "is a JPEG image"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "PNG"),
        (b"PK\x03\x04\0\0\x08\x08\0\0\0\0\0\0\0\0\0\0archive/data.pkl", "is a PyTorch pickle"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "is a PyTorch pickle"),
        (b"GGUF\x03\0\0\0\x01\0\0\0", "is a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "git lfs pull"),
        (b"", "is an empty file"),
        (&[0; 300], "begins with zeros"),
        (b"\x02\0\0\0\0\0\0\0{}more", "not one safetensors file"),
        (b"\xff\0\0\0\0\0\0\0{", "truncated download?"),
    ] {
        fs::write(folder.path().join(UNET), bytes).unwrap();
        if !words.contains("PNG") {
            fails(&["inspect", &whole], 1, &[UNET, words]);
        }
        fs::write(&alone, bytes).unwrap();
        fails(&["generate", "x", "--model", &alone], 1, &["m.safetensors", words]);
    }
}

#[cfg(unix)]
#[test]
fn pipes_folders_devices_and_links_to_nowhere_are_refused_at_once() {
    use std::os::unix::fs::symlink;
    let folder = copied("tiny-sd1");
    let whole = path(&folder, "");
    type Make<'a> = &'a dyn Fn(&Path);
    let make: [(Make, &str); 5] = [
        (
            &|path| assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success()),
            "is not a regular file",
        ),
        (&|path| fs::create_dir(path).unwrap(), "is not a regular file"),
        (&|path| symlink("/dev/zero", path).unwrap(), "is not a regular file"),
        (&|path| drop(std::os::unix::net::UnixListener::bind(path).unwrap()), "is not a regular file"),
        (&|path| symlink("../../blobs/0f1e", path).unwrap(), "is a link to ../../blobs/0f1e, which is not there"),
    ];
    for (make, words) in make {
        for name in [UNET, "single.safetensors"] {
            let file = folder.path().join(name);
            let _ = fs::remove_file(&file);
            make(&file);
            // A folder may be a model, whatever its name.
            let words = if name != UNET && file.is_dir() { "is not a diffusers folder" } else { words };
            let given = if name == UNET { &whole } else { &path(&folder, name) };
            fails(&["generate", "x", "--model", given], 1, &[name, words]);
            let _ = fs::remove_file(&file).or_else(|_| fs::remove_dir(&file));
        }
    }
}

/// Metadata that is null, and more tokens than the text encoder embeds.
#[test]
fn a_header_without_metadata_is_read_and_tokens_without_a_row_are_refused() {
    let folder = copied("tiny-sd1");
    let whole = path(&folder, "");
    let unet = folder.path().join(UNET);
    let bytes = fs::read(&unet).unwrap();
    let end = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..end]).unwrap();
    header["__metadata__"] = serde_json::Value::Null;
    let header = header.to_string();
    let parts = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[end..]];
    fs::write(&unet, parts.concat()).unwrap();
    succeeds(&["inspect", &whole]);

    let entries: Vec<String> = (0..100_000).map(|i| format!("\"<x{i}>\": {}", 819 + i)).collect();
    fs::write(folder.path().join("tokenizer/added_tokens.json"), format!("{{{}}}", entries.join(","))).unwrap();
    let started = std::time::Instant::now();
    fails(&["inspect", &whole], 1, &["tokenizer: has 100819 tokens but the text encoder embeds"]);
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
    fs::write(folder.path().join("tokenizer/added_tokens.json"), "<html>").unwrap();
    fails(&["inspect", &whole], 1, &["tokenizer", "added_tokens.json", "is a web page (HTML), not JSON"]);
}
