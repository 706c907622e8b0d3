//! Numbers of a machine of real processes, as Prometheus gets them.

use crate::fixture::{PATIENCE, Place, send, two_engines};
use rustix::process::Signal;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

/// The metrics that are served at this address now.
fn scrape(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: {address}\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    answer
}

/// Whether these samples are as they should be; `name{labels} value`, without the machine's label.
fn missing(text: &str, samples: &[&str]) -> Vec<String> {
    let plain = text.replace("{machine=\"vm0\"}", "").replace("machine=\"vm0\",", "");
    let lines: Vec<_> = plain.lines().collect();
    let absent = samples.iter().filter(|sample| !lines.contains(*sample));
    absent.map(|&sample| sample.to_owned()).collect()
}

/// Scrapes until all samples are there.
#[track_caller]
fn scrape_until(address: &str, samples: &[&str]) -> String {
    let end = Instant::now() + PATIENCE;
    loop {
        let text = scrape(address);
        let missing = missing(&text, samples);
        if missing.is_empty() {
            return text;
        }
        assert!(Instant::now() < end, "never {missing:?} in\n{text}");
    }
}

#[test]
fn a_machine_is_counted_from_its_start_to_its_end() {
    let place = Place::new();
    let file = place.write("vm0.toml", &two_engines("on-loss = \"restart\""));
    let file = file.to_str().unwrap();
    let mut running = place.begin(&[file, "--metrics", "127.0.0.1:0"]);
    let said = running.is_up();
    let url = said.lines().find_map(|line| line.strip_prefix("metrics: http://")).unwrap();
    let address = url.strip_suffix("/metrics").unwrap();

    scrape_until(
        address,
        &[
            "standstill_machine_state{state=\"running\"} 1",
            "standstill_transitions_total{operation=\"pause\",outcome=\"Done\"} 0",
            "standstill_device_up{device=\"engine0\"} 1",
            "standstill_device_migration_state{device=\"engine1\"} 2",
        ],
    );
    place.expect(0, &["pause"]);
    scrape_until(
        address,
        &[
            "standstill_machine_state{state=\"stopped\"} 1",
            "standstill_transitions_total{operation=\"pause\",outcome=\"Done\"} 1",
            "standstill_phase_duration_seconds_count{phase=\"PrepareStop\"} 1",
            "standstill_device_migration_state{device=\"engine1\"} 1",
        ],
    );
    place.expect(0, &["resume"]);
    scrape_until(
        address,
        &[
            "standstill_transitions_total{operation=\"resume\",outcome=\"Done\"} 1",
            "standstill_downtime_seconds_count 1",
        ],
    );

    send(&place.device("engine1"), Signal::KILL);
    let text = scrape_until(
        address,
        &[
            "standstill_device_fences_total{device=\"engine1\"} 1",
            "standstill_device_restart_attempts_total{device=\"engine1\"} 1",
            "standstill_device_incarnation{device=\"engine1\"} 2",
            "standstill_device_standing{device=\"engine1\",standing=\"ready\"} 1",
            "standstill_device_incarnation{device=\"engine0\"} 1",
        ],
    );
    assert!(text.contains("standstill_device_losses_total{machine=\"vm0\",device=\"engine1\""));

    place.expect(0, &["remove", "engine1"]);
    scrape_until(address, &["standstill_device_up{device=\"engine0\"} 1"]);
    let end = Instant::now() + PATIENCE;
    while scrape(address).contains("engine1") {
        assert!(Instant::now() < end, "a removed device has metrics");
    }
    place.expect(0, &["shutdown"]);
    assert_eq!(running.ends().status.code(), Some(0));
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn an_address_that_is_taken_is_told_and_nothing_is_started() {
    let place = Place::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let file = place.write("vm0.toml", &two_engines(""));
    let said = place.expect(1, &["run", file.to_str().unwrap(), "--metrics", &address]);
    let told = format!("cannot serve metrics at {address}");
    assert!(said.contains(&told) && said.contains("choose another --metrics"), "{said}");
    assert_eq!(std::fs::read_dir(place.runtime()).unwrap().count(), 0);
}
