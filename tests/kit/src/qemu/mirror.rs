//! The Debian mirror that the machine's own apt settings name: no other is ever asked.
//!
//! Both formats of `sources.list(5)` are read: one-line entries, and deb822 stanzas.

use std::fs;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Where apt has its sources.
const FOLDER: &str = "/etc/apt";
/// Suites under which a mirror offers a whole Debian, beside the machine's own code name.
const SUITES: [&str; 5] = ["oldstable", "stable", "testing", "unstable", "sid"];

/// The machine's apt settings name no mirror of Debian.
#[derive(Debug, Error)]
pub enum MirrorError {
    /// They cannot be read.
    #[error("apt's sources in {} cannot be read: {source}", path.display())]
    Read {
        /// Which file or folder.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// They have no entry for packages of a whole Debian.
    #[error(
        "no entry in {FOLDER}/sources.list or {FOLDER}/sources.list.d offers the packages of a \
         whole Debian (component `main` of {suites:?})"
    )]
    None {
        /// The suites that were looked for.
        suites: Vec<String>,
    },
}

/// One entry: packages of these suites and components, at these places.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Entry {
    types: Vec<String>,
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    disabled: bool,
}

impl Entry {
    /// The place, if it is one of binary packages of a whole Debian.
    fn mirror(&self, suites: &[String]) -> Option<&str> {
        let has = |list: &[String], word: &str| list.iter().any(|known| known == word);
        let whole = !self.disabled
            && has(&self.types, "deb")
            && has(&self.components, "main")
            && self.suites.iter().any(|suite| has(suites, suite));
        let mut uris = self.uris.iter().map(String::as_str);
        uris.find(|uri| whole && !uri.starts_with("cdrom:"))
    }
}

/// The mirror, as apt's sources write it.
pub(super) fn mirror() -> Result<String, MirrorError> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let suites: Vec<_> = code_name(&release).into_iter().chain(SUITES.map(str::to_owned)).collect();
    let mut entries = Vec::new();
    for path in files()? {
        let text = fs::read_to_string(&path);
        let text = text.map_err(|source| MirrorError::Read { path: path.clone(), source })?;
        let stanzas = path.extension().is_some_and(|extension| extension == "sources");
        entries.extend(if stanzas { deb822(&text) } else { one_line(&text) });
    }
    let found = entries.iter().find_map(|entry| entry.mirror(&suites)).map(str::to_owned);
    found.ok_or(MirrorError::None { suites })
}

/// The files of apt's sources, in the order in which apt reads them.
fn files() -> Result<Vec<PathBuf>, MirrorError> {
    let list = Path::new(FOLDER).join("sources.list");
    let parts = Path::new(FOLDER).join("sources.list.d");
    let mut files = Vec::new();
    if parts.is_dir() {
        let failed = |source| MirrorError::Read { path: parts.clone(), source };
        for file in fs::read_dir(&parts).map_err(failed)? {
            let path = file.map_err(failed)?.path();
            if path.extension().is_some_and(|known| known == "list" || known == "sources") {
                files.push(path);
            }
        }
    }
    files.sort();
    if list.is_file() {
        files.insert(0, list);
    }
    Ok(files)
}

/// The machine's own release, by its `os-release(5)`.
fn code_name(release: &str) -> Option<String> {
    let value = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(value.trim_matches(['"', '\'']).to_owned())
}

/// Entries such as `deb [arch=amd64] http://mirror/debian trixie main contrib`.
fn one_line(text: &str) -> Vec<Entry> {
    let entry = |line: &str| {
        let line = line.split('#').next().unwrap_or_default().trim();
        let (kind, rest) = line.split_once(char::is_whitespace)?;
        let rest = rest.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => options.split_once(']')?.1,
            None => rest,
        };
        let mut words = rest.split_whitespace().map(str::to_owned);
        Some(Entry {
            types: vec![kind.to_owned()],
            uris: vec![words.next()?],
            suites: vec![words.next()?],
            components: words.collect(),
            disabled: false,
        })
    };
    text.lines().filter_map(entry).collect()
}

/// Stanzas of fields, one stanza for each entry, with an empty line between them.
fn deb822(text: &str) -> Vec<Entry> {
    let mut entries = vec![Entry::default()];
    // The field that a line which begins with a space goes on with.
    let mut field = String::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if line.trim().is_empty() {
            entries.push(Entry::default());
            field.clear();
            continue;
        }
        let mut value = line;
        if !line.starts_with([' ', '\t']) {
            let Some((name, rest)) = line.split_once(':') else { continue };
            field = name.trim().to_ascii_lowercase();
            value = rest;
        }
        let Some(entry) = entries.last_mut() else { continue };
        let words = value.split_whitespace().map(str::to_owned);
        match field.as_str() {
            "types" => entry.types.extend(words),
            "uris" => entry.uris.extend(words),
            "suites" => entry.suites.extend(words),
            "components" => entry.components.extend(words),
            "enabled" => entry.disabled = is_no(value.trim()),
            _ => {}
        }
    }
    entries.retain(|entry| *entry != Entry::default());
    entries
}

/// What apt takes for a no.
fn is_no(word: &str) -> bool {
    ["no", "false", "without", "off", "disable", "0"].contains(&word.to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(entries: &[Entry]) -> Option<&str> {
        let suites = ["bookworm".to_owned(), "stable".to_owned()];
        entries.iter().find_map(|entry| entry.mirror(&suites))
    }

    #[test]
    fn a_stanza_is_found_behind_comments_and_others_that_are_not_of_a_whole_debian() {
        let text = "\
            Types: deb\nURIs: https://other.example/repo\nSuites: bookworm\nComponents: contrib\n\n\
            Types: deb\nEnabled: no\nURIs: http://off.example/debian\nSuites: bookworm\nComponents: main\n\
            \n# a comment\nTypes: deb deb-src\n# another one\nURIs: http://a.example/debian\n\
            Suites: bookworm\n bookworm-updates\nComponents: main contrib\nSigned-By: /a/key.gpg\n\n\
            Types: deb\nURIs: http://a.example/debian-security\nSuites: bookworm-security\nComponents: main\n";
        let entries = deb822(text);
        assert_eq!(entries.len(), 4, "{entries:#?}");
        assert_eq!(first(&entries), Some("http://a.example/debian"));
        assert_eq!(entries[2].suites, ["bookworm", "bookworm-updates"]);
        assert_eq!(first(&entries[3..]), None, "security updates are no whole Debian");
    }

    #[test]
    fn a_line_is_found_with_options_and_without() {
        let text = "# deb http://off.example/debian bookworm main\n\
                    deb cdrom:[Debian]/ bookworm main\n\
                    deb-src http://src.example/debian bookworm main\n\
                    deb [ arch=amd64 signed-by=/a/key.gpg ] http://a.example/debian stable main # why\n\
                    deb http://b.example/debian bookworm main non-free-firmware\n";
        let entries = one_line(text);
        assert_eq!(entries.len(), 4, "{entries:#?}");
        assert_eq!(first(&entries), Some("http://a.example/debian"));
        assert_eq!(first(&entries[3..]), Some("http://b.example/debian"));
    }

    #[test]
    fn what_is_no_entry_is_none() {
        for text in
            ["", "\n\n", "deb", "deb [open http://a.example bookworm main", ": :\n :\n", "x"]
        {
            assert_eq!(first(&one_line(text)), None, "{text:?}");
            assert_eq!(first(&deb822(text)), None, "{text:?}");
        }
    }

    #[test]
    fn the_code_name_has_quotes_or_none() {
        assert_eq!(code_name("ID=debian\nVERSION_CODENAME=trixie\n").unwrap(), "trixie");
        assert_eq!(code_name("VERSION_CODENAME=\"trixie\"").unwrap(), "trixie");
        assert_eq!(code_name("ID=debian"), None);
    }
}
