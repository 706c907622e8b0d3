//! A text that claims to be a machine file, or one device of it.
//!
//! The first byte says which of them it is; the others are the text.

#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::fuzzing::{Machine, read_device, read_machine};
use standstill_fuzz::memory::{Counting, used_by};
use std::collections::HashSet;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What reading may cost whatever the text.
const HEAP: usize = 4 << 20;
/// What it may cost for each byte: a key of a few bytes can be wrong, and a message says so.
const HEAP_OF_A_BYTE: usize = 1024;
/// A key that no table has.
const FOREIGN: &str = "zzz-foreign";

fuzz_target!(|input: &[u8]| {
    let Some((&kind, bytes)) = input.split_first() else { return };
    let text = String::from_utf8_lossy(bytes);
    let (_, usage) = used_by(|| {
        if kind & 1 == 0 {
            machine(&text);
        } else {
            let (there, read) = read_device(&text);
            assert!(there || !is_fine(&read) || text.contains("device"), "{read:?}");
            well_said(&text, &read);
        }
    });
    let most = HEAP + HEAP_OF_A_BYTE * text.len();
    assert!(usage.peak <= most, "{} bytes of the heap for {} of text", usage.peak, text.len());
});

fn is_fine(read: &Machine) -> bool {
    read.problems.as_array().is_some_and(Vec::is_empty)
}

fn machine(text: &str) {
    let read = read_machine(text);
    well_said(text, &read);
    if !is_fine(&read) {
        return;
    }
    // What could be started can be told apart.
    let is_file_name =
        |name: &str| !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0']);
    assert!(is_file_name(&read.name), "{:?}", read.name);
    let (mut names, mut sockets) = (HashSet::new(), HashSet::new());
    for (name, socket) in &read.devices {
        assert!(is_file_name(name), "{name:?}");
        assert!(names.insert(name), "two devices are named {name:?}");
        if let Some(socket) = socket {
            assert!(sockets.insert(socket), "two devices have the socket {}", socket.display());
        }
    }
    // A comment changes nothing, and one wrong key is one problem, which names it.
    assert!(is_fine(&read_machine(&format!("# one\n{text}\n# two"))), "with comments");
    let wrong = read_machine(&format!("{FOREIGN} = 1\n{text}"));
    let problems = wrong.problems.as_array().cloned().unwrap_or_default();
    assert_eq!(problems.len(), 1, "{}", wrong.shown);
    assert_eq!((&problems[0]["line"], &problems[0]["column"]), (&1.into(), &1.into()));
    assert!(wrong.shown.contains(FOREIGN), "{}", wrong.shown);
}

/// Every problem says something and where; and nothing of it can move somebody's cursor.
fn well_said(text: &str, read: &Machine) {
    assert_eq!(read.shown.is_empty(), is_fine(read), "{}", read.shown);
    let odd = read.shown.chars().find(|c| c.is_control() && !matches!(c, '\n' | '\t'));
    assert_eq!(odd, None, "{:?}", read.shown);
    assert!(read.coloured.is_empty() == is_fine(read));
    let lines = text.matches('\n').count() as u64 + 1;
    for problem in read.problems.as_array().into_iter().flatten() {
        let line = problem["line"].as_u64().unwrap_or(0);
        assert!((1..=lines).contains(&line), "{problem} of {lines} lines");
        assert!(problem["column"].as_u64().is_some_and(|column| column > 0), "{problem}");
        assert!(problem["message"].as_str().is_some_and(|text| !text.is_empty()), "{problem}");
    }
}
