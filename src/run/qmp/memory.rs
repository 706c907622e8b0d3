//! Whether the VM ran before a pause has stopped it.

use super::TARGET;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// What is remembered over a pause: in a file, since whoever resumes may be a later process that has
/// taken the machine over.
#[derive(Debug)]
pub(super) struct Memory {
    path: PathBuf,
    ran: Mutex<bool>,
}

impl Memory {
    /// What is remembered there.
    pub(super) fn at(path: PathBuf) -> Self {
        let ran = Mutex::new(path.exists());
        Self { path, ran }
    }

    /// Whether a pause has stopped it.
    pub(super) fn ran(&self) -> bool {
        *self.ran.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be said before it is stopped, and after it goes on.
    pub(super) fn set(&self, ran: bool) {
        *self.ran.lock().unwrap_or_else(PoisonError::into_inner) = ran;
        let written = match (ran, fs::remove_file(&self.path)) {
            (true, _) => fs::write(&self.path, "true\n"),
            (false, Err(error)) if error.kind() != io::ErrorKind::NotFound => Err(error),
            (false, _) => Ok(()),
        };
        if let Err(error) = written {
            // A pause is worth more than what comes after the loss of this process.
            tracing::warn!(target: TARGET,
                path = %self.path.display(), %error, ran,
                "a later `standstill run` will not know whether the VM ran before the pause"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_process_knows_what_this_one_knew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm-ran");
        let memory = Memory::at(path.clone());
        assert!(!memory.ran());
        for _ in 0..2 {
            memory.set(true);
            assert!(memory.ran() && Memory::at(path.clone()).ran());
        }
        for _ in 0..2 {
            memory.set(false);
            assert!(!memory.ran() && !Memory::at(path.clone()).ran());
        }
    }

    #[test]
    fn a_folder_that_is_gone_costs_only_the_later_process() {
        let memory = Memory::at("/nowhere/vm-ran".into());
        memory.set(true);
        assert!(memory.ran());
    }
}
