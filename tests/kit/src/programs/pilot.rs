//! A coordinator that does what it is told, line by line; see [`crate::pilot`].

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "it speaks to a test")]

use crate::chain;
use crate::pilot::{Course, SUPERSEDED};
use standstill_coordinator::{Events, Machine, MachineError, MachineEvent};
use std::ffi::OsString;
use std::fs::File;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

type Error = Box<dyn std::error::Error>;

/// Runs the coordinator; what to exit with.
pub(super) fn main(arguments: &[OsString]) -> u8 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let run = |runtime: tokio::runtime::Runtime| runtime.block_on(run(arguments));
    runtime.map_err(Error::from).and_then(run).unwrap_or_else(|error| {
        eprintln!("pilot: {}", chain(&*error));
        1
    })
}

async fn run(arguments: &[OsString]) -> Result<u8, Error> {
    let argument = arguments.first().and_then(|argument| argument.to_str());
    let argument = argument.ok_or("usage: pilot COURSE (JSON)")?;
    let course: Course = serde_json::from_str(argument)?;
    let machine = course.builder()?.start().await?;
    let events = machine.events();
    println!("started");
    let (send, orders) = unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            let Ok(line) = line else { return };
            if send.send(line).is_err() {
                return;
            }
        }
    });
    tokio::select! {
        superseded = superseded(events) => {
            println!("superseded {}", superseded?);
            // Whatever it is asked now is refused, and the devices live on.
            let refused = machine.resume().await;
            assert!(matches!(refused, Err(MachineError::Superseded { .. })), "{refused:?}");
            drop(machine);
            Ok(SUPERSEDED)
        }
        done = obey(&machine, orders) => {
            done?;
            Ok(0)
        }
    }
}

/// Waits until another coordinator has the machine; its term.
async fn superseded(mut events: Events) -> Result<u64, Error> {
    loop {
        match events.recv().await {
            Some(MachineEvent::Superseded { term }) => return Ok(term.0),
            Some(_) => {}
            // The machine has ended; the other branch knows why.
            None => std::future::pending().await,
        }
    }
}

/// Does what it is told until it is told to end.
async fn obey(machine: &Machine, mut orders: UnboundedReceiver<String>) -> Result<(), Error> {
    while let Some(order) = orders.recv().await {
        if let Some(path) = order.strip_prefix("ram ") {
            let ram = File::options().read(true).write(true).open(path)?;
            match machine.declare_ram(&ram).await {
                Ok(()) => println!("ram Done"),
                Err(error) => println!("ram failed: {}", chain(&error)),
            }
            continue;
        }
        match order.as_str() {
            "pause" => match machine.pause().await {
                Ok(stopped) => {
                    println!("pause {}", stopped.report().outcome.name());
                    stopped.leave_stopped();
                }
                Err(error) => println!("pause failed: {error}"),
            },
            "resume" => match machine.resume().await {
                Ok(report) => println!("resume {}", report.outcome.name()),
                Err(error) => println!("resume failed: {error}"),
            },
            "status" => println!("status {}", machine.status().await?.machine),
            "leave" => return Ok(()),
            _ => break,
        }
    }
    machine.shutdown().await?;
    println!("ended");
    Ok(())
}
