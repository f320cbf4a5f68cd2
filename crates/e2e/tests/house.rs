//! The house holds its own drawing: arrows between crates, async runtimes, file lengths, and where `unsafe` may live.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// One line of ARCHITECTURE.md's `arrows` block, or what cargo says of one crate.
#[derive(Debug, Default, PartialEq, Eq)]
struct Room {
    arrows: BTreeSet<String>,
    is_async: bool,
}

#[test]
fn arrows_are_those_of_architecture_md() {
    let drawn = drawn_arrows();
    let built = built_arrows();
    for (name, room) in &built {
        let shown = drawn.get(name).unwrap_or_else(|| panic!("crate {name} is not in ARCHITECTURE.md"));
        let extra: Vec<_> = room.arrows.difference(&shown.arrows).collect();
        assert!(extra.is_empty(), "{name} → {extra:?} is not drawn in ARCHITECTURE.md");
        assert!(shown.is_async || !room.is_async, "{name} links an async runtime, and ARCHITECTURE.md shows none");
    }
    for (name, shown) in &drawn {
        let room = built.get(name).unwrap_or_else(|| panic!("ARCHITECTURE.md draws {name}, which does not exist"));
        let gone: Vec<_> = shown.arrows.difference(&room.arrows).collect();
        assert!(gone.is_empty(), "ARCHITECTURE.md draws {name} → {gone:?}, which no longer exists");
    }
}

#[test]
fn arrows_only_point_down() {
    let drawn = drawn_arrows();
    // Taking away rooms without arrows must empty the house; a circle would remain.
    let mut left: BTreeSet<&String> = drawn.keys().collect();
    while let Some(ground) = left.iter().copied().find(|n| drawn[*n].arrows.iter().all(|a| !left.contains(a))) {
        left.remove(ground);
    }
    assert!(left.is_empty(), "a circle of arrows among {left:?}");
}

#[test]
fn long_files_stand_in_the_list_with_a_reason() {
    let list = std::fs::read_to_string(Path::new(ROOT).join("docs/exceptions.md")).unwrap();
    let excused: BTreeSet<&str> =
        list.lines().filter_map(|l| l.strip_prefix("| `")?.split_once('`')).map(|(file, _)| file).collect();
    let long: Vec<String> = rust_files().into_iter().filter(|file| product_lines(file) > 600).collect();
    let long: BTreeSet<&str> = long.iter().map(String::as_str).collect();
    assert_eq!(long, excused, "left: files over 600 lines; right: docs/exceptions.md");
}

#[test]
fn unsafe_stays_in_kernel() {
    let word = ["unsafe", "_code"].concat();
    for file in rust_files().iter().filter(|f| !f.starts_with("crates/kernel/")) {
        let text = std::fs::read_to_string(Path::new(ROOT).join(file)).unwrap();
        assert!(!text.contains(&word), "{file} allows unsafe code outside crates/kernel");
    }
}

/// The `arrows` block of ARCHITECTURE.md.
fn drawn_arrows() -> BTreeMap<String, Room> {
    let text = std::fs::read_to_string(Path::new(ROOT).join("ARCHITECTURE.md")).unwrap();
    let block = text.split("```arrows\n").nth(1).and_then(|b| b.split("```").next()).expect("an arrows block");
    let mut rooms = BTreeMap::new();
    for line in block.lines() {
        let (name, rest) = line.split_once('→').expect("NAME → NAMES");
        let (names, is_async) = match rest.split_once("[async]") {
            Some((names, _)) => (names, true),
            None => (rest, false),
        };
        let arrows = names.split(',').map(|n| n.trim().to_owned()).filter(|n| !n.is_empty()).collect();
        rooms.insert(name.trim().to_owned(), Room { arrows, is_async });
    }
    rooms
}

/// What `cargo metadata` says: dependencies that are linked into the product.
fn built_arrows() -> BTreeMap<String, Room> {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--locked"])
        .current_dir(ROOT)
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let mut built = BTreeMap::new();
    for package in metadata["packages"].as_array().unwrap() {
        let deps = package["dependencies"].as_array().unwrap();
        let linked: Vec<&str> =
            deps.iter().filter(|d| d["kind"].is_null()).map(|d| d["name"].as_str().unwrap()).collect();
        let room = Room {
            arrows: linked.iter().filter_map(|n| n.strip_prefix("twill-")).map(str::to_owned).collect(),
            is_async: linked.iter().any(|n| ["tokio", "tonic", "async-std", "smol"].contains(n)),
        };
        let name = package["name"].as_str().unwrap();
        built.insert(name.strip_prefix("twill-").unwrap_or(name).to_owned(), room);
    }
    built
}

/// Lines of a file up to its unit tests.
fn product_lines(file: &str) -> usize {
    let text = std::fs::read_to_string(Path::new(ROOT).join(file)).unwrap();
    text.find("\n#[cfg(test)]\nmod ").map_or(text.as_str(), |end| &text[..end]).lines().count()
}

/// All product source files, as paths below the root.
fn rust_files() -> Vec<String> {
    let mut files = Vec::new();
    let mut folders: Vec<PathBuf> = std::fs::read_dir(Path::new(ROOT).join("crates"))
        .unwrap()
        .map(|entry| entry.unwrap().path().join("src"))
        .filter(|p| p.is_dir())
        .collect();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") {
                files.push(path.strip_prefix(ROOT).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    files
}
