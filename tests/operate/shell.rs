//! Completions and man pages.

use crate::fixture::Place;

/// The subcommands, as the help has them.
fn subcommands(place: &Place) -> Vec<String> {
    let help = place.expect(0, &["--help"]);
    let list = help.split("Commands:").nth(1).unwrap().split("Options:").next().unwrap();
    let names = list.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names = names.filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(str::to_owned).collect()
}

#[test]
fn every_subcommand_is_completed_and_has_a_page() {
    let place = Place::new();
    let names = subcommands(&place);
    assert!(names.len() >= 15, "{names:?}");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = place.expect(0, &["completions", shell]);
        for name in &names {
            assert!(script.contains(name.as_str()), "{shell}: {name}");
        }
    }
    place.expect(0, &["man", "pages"]);
    for name in &names {
        let page = place.path(&format!("pages/standstill-{name}.1"));
        let page = std::fs::read_to_string(&page).unwrap_or_else(|e| panic!("{page:?}: {e}"));
        assert!(page.contains(".SH SYNOPSIS"), "{name}: {page}");
    }
    assert!(place.path("pages/standstill.1").exists());
    let said = place.expect(1, &["man", "/dev/null/pages"]);
    assert!(said.contains("/dev/null/pages"), "{said}");
}

#[test]
fn the_completion_of_bash_is_a_script_that_bash_reads() {
    let place = Place::new();
    let script = place.write("standstill.bash", &place.expect(0, &["completions", "bash"]));
    let read = std::process::Command::new("bash").arg("-n").arg(script).status().unwrap();
    assert!(read.success());
}
