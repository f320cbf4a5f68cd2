//! The house holds its own drawing: arrows between crates, async runtimes, file lengths, and where `unsafe` may live.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// One line of ARCHITECTURE.md's `arrows` block, or what cargo says of one crate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Room {
    arrows: BTreeSet<String>,
    is_async: bool,
}

#[test]
fn arrows_are_those_of_architecture_md() {
    assert_eq!(differences(&drawn_arrows(), &built_arrows()), Vec::<String>::new());
}

#[test]
fn a_wrong_arrow_a_wrong_runtime_and_a_wrong_room_are_noticed() {
    let (drawn, built) = (drawn_arrows(), built_arrows());
    let wrong = |change: &dyn Fn(&mut BTreeMap<String, Room>)| {
        let mut changed = built.clone();
        change(&mut changed);
        differences(&drawn, &changed)
    };
    let new_arrow = wrong(&|rooms| {
        rooms.get_mut("core").unwrap().arrows.insert("kernel".into());
    });
    assert_eq!(new_arrow, ["core → kernel is not drawn"]);
    let gone_arrow = wrong(&|rooms| {
        rooms.get_mut("lab").unwrap().arrows.remove("kernel");
    });
    assert_eq!(gone_arrow, ["lab → kernel is drawn, and not there"]);
    let runtime = wrong(&|rooms| rooms.get_mut("kernel").unwrap().is_async = true);
    assert_eq!(runtime, ["kernel links an async runtime, and none is drawn"]);
    let new_room = wrong(&|rooms| {
        rooms.insert("attic".into(), Room::default());
    });
    assert_eq!(new_room, ["attic is not drawn"]);
    let gone_room = wrong(&|rooms| {
        rooms.remove("packet");
    });
    assert_eq!(gone_room, ["packet is drawn, and does not exist"]);
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

/// Where the drawing and the house differ.
fn differences(drawn: &BTreeMap<String, Room>, built: &BTreeMap<String, Room>) -> Vec<String> {
    let mut found = Vec::new();
    for (name, room) in built {
        let Some(shown) = drawn.get(name) else {
            found.push(format!("{name} is not drawn"));
            continue;
        };
        found.extend(room.arrows.difference(&shown.arrows).map(|to| format!("{name} → {to} is not drawn")));
        found.extend(shown.arrows.difference(&room.arrows).map(|to| format!("{name} → {to} is drawn, and not there")));
        if room.is_async && !shown.is_async {
            found.push(format!("{name} links an async runtime, and none is drawn"));
        }
    }
    let gone = drawn.keys().filter(|name| !built.contains_key(*name));
    found.extend(gone.map(|name| format!("{name} is drawn, and does not exist")));
    found
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

/// What `cargo metadata` says: dependencies that are linked into the product, and whether a runtime is among all that those link.
fn built_arrows() -> BTreeMap<String, Room> {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--filter-platform"])
        .arg(format!("{}-unknown-linux-gnu", std::env::consts::ARCH))
        .current_dir(ROOT)
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let list = |value: &serde_json::Value| value.as_array().unwrap().clone();
    let packages = list(&metadata["packages"]);
    let names: BTreeMap<String, String> = packages.iter().map(|p| (text(&p["id"]), text(&p["name"]))).collect();
    let links: BTreeMap<String, Vec<String>> = list(&metadata["resolve"]["nodes"])
        .iter()
        .map(|node| {
            let deps = list(&node["deps"]);
            let linked = deps.iter().filter(|d| list(&d["dep_kinds"]).iter().any(|kind| kind["kind"].is_null()));
            (text(&node["id"]), linked.map(|d| text(&d["pkg"])).collect())
        })
        .collect();
    let mut built = BTreeMap::new();
    for member in list(&metadata["workspace_members"]) {
        let id = text(&member);
        let arrows = links[&id].iter().filter_map(|to| names[to].strip_prefix("twill-")).map(str::to_owned).collect();
        let mut reached = BTreeSet::from([&id]);
        let mut next = vec![&id];
        while let Some(from) = next.pop() {
            next.extend(links[from].iter().filter(|to| reached.insert(to)));
        }
        let is_async = reached.iter().any(|id| ["tokio", "async-std", "smol"].contains(&names[*id].as_str()));
        built.insert(names[&id].strip_prefix("twill-").unwrap_or(&names[&id]).to_owned(), Room { arrows, is_async });
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
