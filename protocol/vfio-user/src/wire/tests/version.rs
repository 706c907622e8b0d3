//! `VERSION`: what is understood, what is refused, what is agreed.

use super::*;
use proptest::option;
use proptest::prelude::*;

/// QEMU 11.1's, as it was seen: 198 bytes, a message of 214.
const QEMU: &str = concat!(
    r#"{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "#,
    r#""max_data_xfer_size": 1048576, "#,
    r#""migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true}}"#
);

fn body(major: u16, minor: u16, json: &[u8]) -> Vec<u8> {
    let mut body = [major.to_ne_bytes(), minor.to_ne_bytes()].concat();
    body.extend(json);
    body
}

fn text(json: &str) -> Result<Version, WireError> {
    Version::decode(&body(0, 1, format!("{json}\0").as_bytes()))
}

fn ours() -> Capabilities {
    Capabilities {
        max_msg_fds: Some(16),
        max_data_xfer_size: Some(1 << 20),
        max_dma_maps: Some(65535),
        pgsizes: Some(4096),
        write_multiple: Some(true),
        twin_socket: None,
        migration: Some(MigrationCapability {
            pgsize: Some(4096),
            max_bitmap_size: Some(256 << 20),
        }),
    }
}

#[test]
fn qemu_is_understood_and_takes_the_answer() {
    let request = body(0, 0, format!("{QEMU}\0").as_bytes());
    let version = Version::decode(&request).expect("QEMU's");
    assert_eq!(version.capabilities, ours());
    let answer = version.answer(&ours()).expect("an answer");
    assert_eq!((answer.major, answer.minor), (0, 0));
    let mut reply = Vec::new();
    Header::command(0, Command::Version)
        .reply()
        .encode_message(&mut reply, 0, |out| answer.encode(out));
    assert!(reply.len() <= 214 && reply.len() <= request.len() + HEADER_SIZE, "{}", reply.len());
    assert_eq!(answer.capabilities, ours());
}

#[test]
fn nothing_is_said_without_having_been_asked() {
    for json in [&b""[..], b"{}\0", b"{\"capabilities\":{}}\0"] {
        let version = Version::decode(&body(0, 0, json)).expect("legal");
        let said = &version.capabilities;
        assert_eq!(said, &Capabilities::default());
        assert_eq!((said.max_msg_fds(), said.max_data_xfer_size()), (1, 1 << 20));
        assert_eq!((said.max_dma_maps(), said.pgsizes()), (65535, 4096));
        assert!(!said.write_multiple());
        let answer = version.answer(&ours()).expect("an answer");
        assert_eq!(answer.capabilities, Capabilities::default());
        // But for what is below what the client takes for granted.
        let small = Capabilities { max_data_xfer_size: Some(1024), ..ours() };
        let answer = version.answer(&small).expect("an answer");
        assert_eq!(answer.capabilities.max_data_xfer_size(), 1024);
    }
}

#[test]
fn unknown_keys_are_ignored() {
    let version = text(r#"{"x":[1],"capabilities":{"max_msg_fds":4,"y":{"z":null}}}"#);
    assert_eq!(version.expect("legal").capabilities.max_msg_fds(), 4);
}

#[test]
fn an_empty_migration_object_is_legal() {
    let version = text(r#"{"capabilities":{"migration":{}}}"#).expect("legal");
    assert_eq!(version.capabilities.migration, Some(MigrationCapability::default()));
}

#[test]
fn what_is_wrong_is_refused() {
    for size in 0..4 {
        let short = Version::decode(&[0; 4][..size]);
        assert!(matches!(short, Err(WireError::Short { .. })), "{short:?}");
    }
    assert!(Version::decode(&body(0, 0, b"{}")).is_err(), "no NUL");
    for json in [
        "",
        "{",
        "nonsense",
        "[]x",
        "[]",
        "7",
        r#"{"capabilities":7}"#,
        r#"{"capabilities":{"max_msg_fds":"4"}}"#,
        r#"{"capabilities":{"max_msg_fds":-1}}"#,
        r#"{"capabilities":{"max_msg_fds":1.5}}"#,
        r#"{"capabilities":{"max_msg_fds":1025}}"#,
        r#"{"capabilities":{"max_data_xfer_size":true}}"#,
        r#"{"capabilities":{"max_data_xfer_size":18446744073709551616}}"#,
        r#"{"capabilities":{"write_multiple":1}}"#,
        r#"{"capabilities":{"twin_socket":true}}"#,
        r#"{"capabilities":[1,2,3]}"#,
        r#"{"capabilities":{"migration":[4096,8]}}"#,
        r#"{"capabilities":{"twin_socket":[true,1]}}"#,
        r#"{"capabilities":{"migration":{"pgsize":4095}}}"#,
    ] {
        let error = text(json).expect_err(json);
        assert_eq!(error.errno(), Errno::EINVAL);
    }
    let long = vec![b' '; MAX_VERSION_SIZE];
    assert!(matches!(Version::decode(&body(0, 0, &long)), Err(WireError::TooLong { .. })));
    let deep = "[".repeat(2000);
    assert!(text(&deep).is_err());
}

#[test]
fn another_major_version_is_another_protocol() {
    for major in [1, u16::MAX] {
        let version = Version { major, ..Version::new(ours()) };
        assert!(matches!(version.answer(&ours()), Err(WireError::Version { .. })));
    }
    for (minor, answered) in [(0, 0), (1, 1), (MINOR, MINOR), (u16::MAX, MINOR)] {
        let version = Version { minor, ..Version::new(ours()) };
        assert_eq!(version.answer(&ours()).expect("an answer").minor, answered);
    }
}

#[test]
fn without_a_common_page_size_there_is_no_mapping() {
    let version = Version::new(Capabilities { pgsizes: Some(1 << 16), ..ours() });
    assert!(matches!(version.answer(&ours()), Err(WireError::Version { .. })));
}

#[test]
fn numbers_are_bounded() {
    let huge = Some(u64::MAX);
    let said = Capabilities {
        max_msg_fds: Some(1024),
        max_data_xfer_size: huge,
        max_dma_maps: huge,
        ..Capabilities::default()
    };
    assert_eq!(said.max_msg_fds(), MAX_MSG_FDS);
    assert_eq!(said.max_data_xfer_size(), MAX_DATA_XFER_SIZE);
    assert_eq!(said.max_dma_maps(), u32::MAX);
}

prop_compose! {
    fn capabilities()(
        max_msg_fds in option::of(0..=1024_u64),
        max_data_xfer_size in option::of(any::<u64>()),
        max_dma_maps in option::of(any::<u64>()),
        pgsizes in option::of(any::<u64>()),
        write_multiple in option::of(any::<bool>()),
        twin_socket in option::of((any::<bool>(), option::of(any::<u64>()))),
        migration in option::of((option::of(0..64_u32), option::of(any::<u64>()))),
    ) -> Capabilities {
        let twin_socket = twin_socket.map(|(supported, fd_index)| TwinSocket { supported, fd_index });
        let migration = migration.map(|(shift, max_bitmap_size)| {
            MigrationCapability { pgsize: shift.map(|shift| 1 << shift), max_bitmap_size }
        });
        Capabilities {
            max_msg_fds, max_data_xfer_size, max_dma_maps, pgsizes, write_multiple, twin_socket,
            migration,
        }
    }
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(major: u16, minor: u16, capabilities in capabilities()) {
        let version = Version { major, minor, capabilities };
        prop_assert_eq!(Version::decode(&bytes(|out| version.encode(out))), Ok(version));
    }

    /// QEMU takes no answer that is longer than its request.
    #[test]
    fn an_answer_is_no_longer_than_its_request(client in capabilities(), server in capabilities()) {
        let server = Capabilities { max_data_xfer_size: Some(1 << 20), max_dma_maps: Some(65535), ..server };
        let request = Version::new(client);
        let Ok(answer) = request.answer(&server) else { return Ok(()) };
        let sizes = [&answer, &request].map(|version| bytes(|out| version.encode(out)).len());
        prop_assert!(sizes[0] <= sizes[1], "{answer:?} to {request:?}");
        // And nothing in it is more than what was asked for.
        let (said, asked) = (&answer.capabilities, &request.capabilities);
        prop_assert!(said.max_msg_fds() <= asked.max_msg_fds().max(1));
        prop_assert!(said.max_data_xfer_size() <= asked.max_data_xfer_size());
        prop_assert!(said.max_dma_maps() <= asked.max_dma_maps());
        prop_assert_eq!(said.pgsizes() & !asked.pgsizes(), 0);
        prop_assert!(asked.write_multiple() || !said.write_multiple());
    }

    #[test]
    fn any_bytes_are_a_version_or_not(bytes: Vec<u8>) {
        if let Err(error) = Version::decode(&bytes) {
            prop_assert!(error.to_string().len() < 500);
        }
    }
}
