//! `standstill top` in a real terminal: it shows the machine, does what keys say, outlives its
//! coordinator, and leaves the terminal as it was.

use crate::fixture::{PATIENCE, Place, Running, gone, pidfd, two_engines};
use nix::pty::{Winsize, openpty};
use rustix::process::Signal;
use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZero;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use vt100::Parser;

const LINES: u16 = 30;
const COLUMNS: u16 = 110;

/// A `standstill top` and its terminal.
struct Top {
    child: Child,
    keys: File,
    output: Receiver<Vec<u8>>,
    screen: Parser,
}

impl Top {
    fn start(place: &Place) -> Self {
        let size = Winsize { ws_row: LINES, ws_col: COLUMNS, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(Some(&size), None).unwrap();
        let stdio = || Stdio::from(pty.slave.try_clone().unwrap());
        let mut command = place.command(&["top", "--interval", "100ms"]);
        command.env("TERM", "xterm-256color").stdin(stdio()).stdout(stdio()).stderr(stdio());
        let child = command.spawn().unwrap();
        // The last of the terminal's other ends is the child's.
        drop((command, pty.slave));
        let keys = File::from(pty.master);
        let mut terminal = keys.try_clone().unwrap();
        let (send, output) = channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(len @ 1..) = terminal.read(&mut bytes) {
                if send.send(bytes[..len].to_vec()).is_err() {
                    return;
                }
            }
        });
        let [lines, columns] = [LINES, COLUMNS].map(|count| NonZero::new(count).unwrap());
        Self { child, keys, output, screen: Parser::new(lines, columns, 0) }
    }

    /// Waits until the screen is as it should be.
    #[track_caller]
    fn until(&mut self, what: &str, fits: impl Fn(&str) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !fits(&self.screen.screen().contents()) {
            let left = end.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.screen.process(&bytes),
                Err(_) => panic!("never {what}:\n{}", self.screen.screen().contents()),
            }
        }
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits for its end; the terminal is as it was before.
    #[track_caller]
    fn ends(mut self) {
        let ended = gone(&pidfd(self.child.id().into()), PATIENCE);
        assert!(ended, "it goes on:\n{}", self.screen.screen().contents());
        assert!(self.child.wait().unwrap().success());
        while let Ok(bytes) = self.output.recv_timeout(PATIENCE) {
            self.screen.process(&bytes);
        }
        let screen = self.screen.screen();
        assert!(!screen.alternate_screen() && !screen.hide_cursor(), "the screen is as it was");
    }
}

impl Drop for Top {
    fn drop(&mut self) {
        // Only if a test has failed is anything left of it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn shut_down(place: &Place, running: Running) {
    place.expect(0, &["shutdown"]);
    assert_eq!(running.ends().status.code(), Some(0));
}

#[test]
fn a_machine_is_watched_and_paused_at_a_terminal() {
    let place = Place::new();
    let running = place.run(&two_engines(""));
    let mut top = Top::start(&place);
    top.until("running", |text| {
        text.contains("vm0 running") && text.contains("2 of 2 devices ready")
    });
    assert!(top.screen.screen().alternate_screen());
    top.until("devices", |text| text.contains("engine1") && text.contains("RUNNING"));
    top.press("p");
    top.until("the question", |text| text.contains("pause vm0? y/n"));
    top.press("y");
    top.until("the pause", |text| {
        text.contains("vm0 stopped") && text.contains("last: pause Done") && text.contains("STOP")
    });
    top.until("its phases", |text| text.contains("PrepareStop") && text.contains("pause: done"));
    top.until("its events", |text| text.contains("pause ended in Done"));
    top.press("ry");
    top.until("the resume", |text| text.contains("resume: done") && text.contains("vm0 running"));
    top.press("q");
    top.ends();
    shut_down(&place, running);
}

#[test]
fn it_goes_on_with_the_next_coordinator() {
    let place = Place::new();
    let running = place.run(&two_engines(""));
    let mut top = Top::start(&place);
    top.until("running", |text| text.contains("vm0 running"));

    running.kill();
    top.until("the loss", |text| text.contains("trying again"));
    let file = place.path("vm0.toml");
    let mut running = place.begin(&[file.to_str().unwrap(), "--attach"]);
    running.is_up();
    top.until("the next one", |text| {
        !text.contains("trying again") && text.contains("last: take-over Done")
    });
    rustix::process::kill_process(rustix::process::Pid::from_child(&top.child), Signal::TERM)
        .unwrap();
    top.ends();
    shut_down(&place, running);
}

#[test]
fn without_a_terminal_or_a_machine_it_says_so() {
    let place = Place::new();
    let said = place.expect(2, &["top"]);
    assert!(said.contains("cannot use the terminal"), "{said}");
    assert!(said.contains("`standstill status`"), "{said}");
    let mut top = Top::start(&place);
    top.until("an error", |text| text.contains("no machine runs in"));
    assert!(!top.screen.screen().alternate_screen());
    assert!(gone(&pidfd(top.child.id().into()), Duration::from_secs(60)));
    assert_eq!(top.child.wait().unwrap().code(), Some(6));
}
