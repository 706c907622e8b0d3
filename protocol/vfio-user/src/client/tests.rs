//! The client against a server that does what a script says.

mod answers;
mod dma;
mod limits;
mod migration;
mod negotiation;
mod threads;

use super::*;
use crate::wire::{Errno, RegionAccess, RegionInfo};
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::time::Instant;

/// For what should not be waited for: long, for busy machines.
const PATIENCE: Duration = Duration::from_secs(30);

/// The other end of a client's socket.
struct Peer {
    receiver: Receiver,
    sender: Sender,
}

/// What a peer hears: a header, a body, fds.
type Heard = (Header, Vec<u8>, Vec<OwnedFd>);

impl Peer {
    fn new(socket: UnixStream) -> Self {
        let limits = FramingLimits { max_message: 64 << 20, max_fds: 16 };
        let (receiver, sender) = connect(socket, limits).expect("a socket");
        Self { receiver, sender }
    }

    fn deadline() -> Deadline {
        Deadline::within(PATIENCE)
    }

    fn hear(&mut self) -> Heard {
        let message = self.receiver.receive(Self::deadline()).expect("a message");
        (message.header, message.body.to_vec(), message.fds)
    }

    /// Hears a command that is expected.
    fn expect(&mut self, command: Command) -> Heard {
        let heard = self.hear();
        assert_eq!(heard.0.command, command.number(), "{command} is expected");
        heard
    }

    /// Nothing follows but the end.
    fn expect_end(&mut self) {
        let end = self.receiver.receive(Self::deadline());
        assert!(matches!(end, Err(crate::connection::ReceiveError::Closed)), "{end:?}");
    }

    fn say(&mut self, header: &Header, body: &[u8], fds: &[BorrowedFd<'_>]) {
        self.sender.send(header, body, fds, Self::deadline(), |_| ()).expect("sent");
    }

    fn answer(&mut self, header: &Header, body: &[u8]) {
        self.say(&header.reply(), body, &[]);
    }

    /// An error reply with this number and body, whatever they are.
    fn refuse(&mut self, header: &Header, error: u32, body: &[u8]) {
        self.say(&Header { error, ..header.refusal(Errno::EIO) }, body, &[]);
    }

    /// Answers the client's VERSION with these capabilities.
    fn welcome(&mut self, capabilities: &Capabilities) {
        let (header, body, _) = self.expect(Command::Version);
        let version = Version::decode(&body).expect("a version");
        let mut answer = Vec::new();
        version.answer(capabilities).expect("an answer").encode(&mut answer);
        self.answer(&header, &answer);
    }

    /// Hears a `REGION_READ` and answers it with the bytes that it asks for.
    fn serve_read(&mut self, byte: u8) {
        let (header, body, _) = self.expect(Command::RegionRead);
        self.answer(&header, &read_answer(&body, byte));
    }
}

/// The answer to a `REGION_READ`.
fn read_answer(body: &[u8], byte: u8) -> Vec<u8> {
    let access = RegionAccess::decode_plain(body, u32::MAX).expect("an access");
    let mut answer = body[..RegionAccess::SIZE].to_vec();
    answer.resize(answer.len() + usize::try_from(access.count).expect("small"), byte);
    answer
}

fn capabilities() -> Capabilities {
    Client::builder().capabilities
}

/// Runs a client of `builder` against a script that begins after the versions.
fn session_of<R>(
    builder: Builder,
    script: impl FnOnce(&mut Peer) + Send,
    run: impl FnOnce(Client) -> R,
) -> R {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(theirs);
            peer.welcome(&capabilities());
            script(&mut peer);
        });
        run(builder.start(ours).expect("a client"))
    })
}

fn session<R>(script: impl FnOnce(&mut Peer) + Send, run: impl FnOnce(Client) -> R) -> R {
    session_of(Client::builder().timeout(PATIENCE), script, run)
}

/// A client against bytes that are sent after the versions, whatever it asks.
fn session_of_bytes<R>(bytes: &[u8], run: impl FnOnce(Client) -> R) -> R {
    let script = |peer: &mut Peer| {
        peer.hear();
        use std::io::Write;
        let socket = peer.receiver.as_fd().try_clone_to_owned().expect("a socket");
        UnixStream::from(socket).write_all(bytes).expect("written");
    };
    session(script, run)
}

/// A body of 32-bit words.
fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn read_4(client: &Client) -> Result<[u8; 4], ClientError> {
    let mut data = [0; 4];
    client.region_read(0, 0x10, &mut data).map(|()| data)
}

/// Whether all calls fail with the same end.
fn is_at_its_end(client: &Client, is_it: impl Fn(&EndError) -> bool) {
    for error in [client.reset(), client.dma_unmap_all()].map(Result::unwrap_err) {
        assert!(matches!(&error, ClientError::Ended(end) if is_it(end)), "{error:?}");
    }
}
