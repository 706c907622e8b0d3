//! The rules against the kernel's tables, written out by hand.

#![forbid(unsafe_code)]

use super::MigrationState as S;
use super::*;

/// One table: the columns (the wanted states), then a row for each present state. A cell is the
/// next arc; `.` means already there, `X` refused. States that are not named are refused.
struct Table {
    flags: u64,
    columns: &'static str,
    rows: &'static [(&'static str, &'static str)],
}

const TABLES: [Table; 4] = [
    Table {
        flags: 1,
        columns: "STOP RUNNING STOP_COPY RESUMING",
        rows: &[
            ("STOP", ". RUNNING STOP_COPY RESUMING"),
            ("RUNNING", "STOP . STOP STOP"),
            ("STOP_COPY", "STOP STOP . STOP"),
            ("RESUMING", "STOP STOP STOP ."),
        ],
    },
    Table {
        flags: 3,
        columns: "STOP RUNNING STOP_COPY RESUMING RUNNING_P2P",
        rows: &[
            ("STOP", ". RUNNING_P2P STOP_COPY RESUMING RUNNING_P2P"),
            ("RUNNING", "RUNNING_P2P . RUNNING_P2P RUNNING_P2P RUNNING_P2P"),
            ("STOP_COPY", "STOP STOP . STOP STOP"),
            ("RESUMING", "STOP STOP STOP . STOP"),
            ("RUNNING_P2P", "STOP RUNNING STOP STOP ."),
        ],
    },
    Table {
        flags: 5,
        columns: "STOP RUNNING STOP_COPY RESUMING PRE_COPY",
        rows: &[
            ("STOP", ". RUNNING STOP_COPY RESUMING RUNNING"),
            ("RUNNING", "STOP . STOP STOP PRE_COPY"),
            ("STOP_COPY", "STOP STOP . STOP X"),
            ("RESUMING", "STOP STOP STOP . STOP"),
            ("PRE_COPY", "RUNNING RUNNING STOP_COPY RUNNING ."),
        ],
    },
    Table {
        flags: 7,
        columns: "STOP RUNNING STOP_COPY RESUMING RUNNING_P2P PRE_COPY PRE_COPY_P2P",
        rows: &[
            ("STOP", ". RUNNING_P2P STOP_COPY RESUMING RUNNING_P2P RUNNING_P2P RUNNING_P2P"),
            ("RUNNING", "RUNNING_P2P . RUNNING_P2P RUNNING_P2P RUNNING_P2P PRE_COPY RUNNING_P2P"),
            ("STOP_COPY", "STOP STOP . STOP STOP X X"),
            ("RESUMING", "STOP STOP STOP . STOP STOP STOP"),
            ("RUNNING_P2P", "STOP RUNNING STOP STOP . RUNNING PRE_COPY_P2P"),
            ("PRE_COPY", "RUNNING RUNNING PRE_COPY_P2P RUNNING RUNNING . PRE_COPY_P2P"),
            (
                "PRE_COPY_P2P",
                "RUNNING_P2P RUNNING_P2P STOP_COPY RUNNING_P2P RUNNING_P2P PRE_COPY .",
            ),
        ],
    },
];

/// The arcs that a device must implement, by what it has.
const ALWAYS: [(S, S); 4] = [
    (S::Resuming, S::Stop),
    (S::Stop, S::Resuming),
    (S::Stop, S::StopCopy),
    (S::StopCopy, S::Stop),
];
const WITHOUT_P2P: [(S, S); 2] = [(S::Running, S::Stop), (S::Stop, S::Running)];
const WITH_P2P: [(S, S); 4] = [
    (S::Running, S::RunningP2p),
    (S::RunningP2p, S::Running),
    (S::RunningP2p, S::Stop),
    (S::Stop, S::RunningP2p),
];
const PRE_COPY_WITHOUT_P2P: [(S, S); 3] =
    [(S::Running, S::PreCopy), (S::PreCopy, S::Running), (S::PreCopy, S::StopCopy)];
const PRE_COPY_WITH_P2P: [(S, S); 7] = [
    (S::Running, S::PreCopy),
    (S::PreCopy, S::Running),
    (S::PreCopy, S::PreCopyP2p),
    (S::PreCopyP2p, S::PreCopy),
    (S::RunningP2p, S::PreCopyP2p),
    (S::PreCopyP2p, S::RunningP2p),
    (S::PreCopyP2p, S::StopCopy),
];

fn direct_arcs(flags: MigrationFlags) -> Vec<(S, S)> {
    let mut arcs = ALWAYS.to_vec();
    arcs.extend_from_slice(if flags.p2p() { &WITH_P2P } else { &WITHOUT_P2P });
    match (flags.pre_copy(), flags.p2p()) {
        (true, true) => arcs.extend_from_slice(&PRE_COPY_WITH_P2P),
        (true, false) => arcs.extend_from_slice(&PRE_COPY_WITHOUT_P2P),
        (false, _) => {}
    }
    arcs
}

fn named(name: &str) -> S {
    S::ALL.into_iter().find(|state| state.name() == name).expect("the tables name states")
}

impl Table {
    fn flags(&self) -> MigrationFlags {
        MigrationFlags::new(self.flags).expect("a legal set")
    }

    /// `None` where the move is refused.
    fn next(&self, from: S, to: S) -> Option<Next> {
        let row = self.rows.iter().find(|(name, _)| named(name) == from)?.1;
        let column = self.columns.split(' ').position(|name| named(name) == to)?;
        let cells: Vec<&str> = row.split(' ').collect();
        assert_eq!(cells.len(), self.columns.split(' ').count(), "row {from} of {}", self.flags);
        match cells[column] {
            "X" => None,
            "." => Some(Next::Already),
            name => Some(Next::Arc(named(name))),
        }
    }
}

/// Every flag set with every pair of the eight states.
fn every_pair() -> impl Iterator<Item = (&'static Table, S, S)> {
    const ALL_TABLES: &[Table; 4] = &TABLES;
    ALL_TABLES.iter().flat_map(|table| {
        S::ALL.into_iter().flat_map(move |from| S::ALL.map(|to| (table, from, to)))
    })
}

#[test]
fn the_next_state_is_the_tables_for_every_pair_and_flag_set() {
    let mut pairs = 0;
    for (table, from, to) in every_pair() {
        let flags = table.flags();
        let expected = table.next(from, to).ok_or(NoWay { from, to, flags });
        assert_eq!(next_state(flags, from, to), expected, "{from} to {to}, flags {}", table.flags);
        pairs += 1;
    }
    assert_eq!(pairs, 4 * 64);
}

#[test]
fn a_path_is_a_chain_of_direct_arcs_that_ends_at_its_target() {
    for (table, from, to) in every_pair() {
        let flags = table.flags();
        let case = format!("{from} to {to}, flags {}", table.flags);
        let Ok(way) = path(flags, from, to) else {
            assert_eq!(table.next(from, to), None, "{case} has no path");
            continue;
        };
        assert_ne!(table.next(from, to), None, "{case} has a path");
        let arcs = direct_arcs(flags);
        let mut at = from;
        for &step in way.as_slice() {
            assert!(arcs.contains(&(at, step)), "{case}: {at} to {step} is no direct arc");
            at = step;
        }
        assert_eq!(at, to, "{case}");
    }
}

#[test]
fn every_direct_arc_is_taken_in_one_step() {
    for table in &TABLES {
        for (from, to) in direct_arcs(table.flags()) {
            let way = path(table.flags(), from, to).unwrap();
            assert_eq!(way.as_slice(), [to], "{from} to {to}, flags {}", table.flags);
        }
    }
}

#[test]
fn the_longest_path_is_exactly_as_long_as_the_constant_says() {
    let longest = every_pair()
        .filter_map(|(table, from, to)| path(table.flags(), from, to).ok())
        .map(|way| way.as_slice().len())
        .max();
    assert_eq!(longest, Some(Path::LONGEST));
}

#[test]
fn switching_over_from_pre_copy_keeps_the_stream() {
    let way = path(MigrationFlags::ALL, S::PreCopy, S::StopCopy).unwrap();
    assert_eq!(way.as_slice(), [S::PreCopyP2p, S::StopCopy]);
}

#[test]
fn only_six_sets_of_flags_are_legal() {
    for bits in 0..16 {
        let made = MigrationFlags::new(bits);
        if [0, 1, 2, 3, 5, 7].contains(&bits) {
            assert_eq!(made.map(MigrationFlags::bits), Ok(bits));
        } else {
            assert_eq!(made, Err(IllegalFlags(bits)));
        }
    }
    // The low byte alone would be legal.
    assert_eq!(MigrationFlags::new(0x1_0000_0001), Err(IllegalFlags(0x1_0000_0001)));
}

#[test]
fn without_a_state_to_save_a_device_goes_the_same_ways_but_never_to_a_stream() {
    let pairs = [
        (MigrationFlags::NO_STATE, MigrationFlags::STOP_COPY),
        (MigrationFlags::NO_STATE_P2P, MigrationFlags::STOP_COPY_P2P),
    ];
    for (without, with) in pairs {
        assert_eq!((without.p2p(), without.stop_copy()), (with.p2p(), false));
        for (from, to) in S::ALL.into_iter().flat_map(|from| S::ALL.map(|to| (from, to))) {
            let in_a_stream = |state| matches!(state, S::StopCopy | S::Resuming);
            if in_a_stream(from) || in_a_stream(to) {
                let refused = NoWay { from, to, flags: without };
                assert_eq!(path(without, from, to), Err(refused));
            } else {
                let way = |flags| path(flags, from, to).ok();
                assert_eq!(way(without), way(with), "{from} to {to}");
            }
        }
    }
}

#[test]
fn a_device_has_the_states_that_its_flags_name() {
    for table in &TABLES {
        for state in S::ALL {
            let listed = table.columns.split(' ').any(|name| named(name) == state);
            let has = table.flags().has(state);
            // ERROR is in no table, and every device has it.
            assert_eq!(has, listed || state == S::Error, "{state}, flags {}", table.flags);
        }
    }
}

#[test]
fn states_have_the_values_of_the_kernels_header() {
    for (value, state) in (0..).zip(S::ALL) {
        assert_eq!(state.value(), value);
        assert_eq!(S::from_value(value), Some(state));
    }
    assert_eq!(S::from_value(8), None);
    assert_eq!(S::from_value(u32::MAX), None);
}
