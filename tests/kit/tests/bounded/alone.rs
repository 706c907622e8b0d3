//! Heap, threads and open files are a matter of a whole process, and other tests may share this one:
//! a test that counts them runs in a process of its own.

use std::process::{Command, Stdio};

/// Runs a test of this program alone. `test` is its name, with its module's.
#[expect(clippy::print_stdout, reason = "the figures of the test that ran elsewhere")]
pub(crate) fn alone(test: &str, run: impl Future<Output = ()>) {
    const MARK: &str = "STANDSTILL_TESTKIT_ALONE";
    if std::env::var_os(MARK).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        return runtime.unwrap().block_on(run);
    }
    let program = std::env::current_exe().unwrap();
    let arguments = [test, "--exact", "--nocapture", "--test-threads=1"];
    let child = Command::new(program).args(arguments).env(MARK, "1").stdin(Stdio::null()).output();
    let output = child.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{}:\n{stdout}\n{stderr}", output.status);
    assert!(stdout.contains("1 passed"), "the test was not found:\n{stdout}");
    print!("{stdout}");
}
