//! Modules of a guest's kernel: where they are, and which others they need before them.

use super::run::{RunError, run};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use thiserror::Error;

/// How long one may take to be unpacked.
const UNPACK: Duration = Duration::from_secs(60);

/// A module cannot be had.
#[derive(Debug, Error)]
pub enum ModuleError {
    /// The kernel has none of that name.
    #[error("the guest's kernel has no module {0:?}")]
    Unknown(String),
    /// It cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It cannot be unpacked.
    #[error("the module cannot be unpacked")]
    Unpack(#[from] RunError),
}

/// The modules of a kernel.
#[derive(Debug)]
pub(super) struct Modules {
    /// Each one's file, by its name in the kernel (with underscores).
    files: BTreeMap<String, PathBuf>,
    /// Those that the kernel has in itself.
    built_in: BTreeSet<String>,
    busybox: PathBuf,
}

/// A module that is to be loaded.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) name: String,
    /// As the kernel takes it.
    pub(super) content: Vec<u8>,
}

impl Modules {
    /// All in the folder of a kernel's version. `busybox` unpacks.
    pub(super) fn new(folder: &Path, busybox: &Path) -> Result<Self, ModuleError> {
        let mut files = BTreeMap::new();
        let mut folders = vec![folder.join("kernel")];
        while let Some(folder) = folders.pop() {
            let failed = |source| ModuleError::Io { path: folder.clone(), source };
            for file in fs::read_dir(&folder).map_err(failed)? {
                let file = file.map_err(failed)?;
                if file.file_type().map_err(failed)?.is_dir() {
                    folders.push(file.path());
                } else if let Some(name) = name(&file.path()) {
                    files.insert(name, file.path());
                }
            }
        }
        let list = folder.join("modules.builtin");
        let text = fs::read_to_string(&list);
        let text = text.map_err(|source| ModuleError::Io { path: list, source })?;
        let built_in = text.lines().filter_map(|line| name(Path::new(line))).collect();
        Ok(Self { files, built_in, busybox: busybox.to_owned() })
    }

    /// These modules in the order in which they can be loaded: each behind what it needs. Those that
    /// are built in are left out.
    pub(super) fn load(&self, names: &[String]) -> Result<Vec<Module>, ModuleError> {
        let mut loaded = Vec::new();
        let mut known = BTreeSet::new();
        for name in names {
            self.add(&name.replace('-', "_"), &mut known, &mut loaded)?;
        }
        Ok(loaded)
    }

    fn add(
        &self,
        name: &str,
        known: &mut BTreeSet<String>,
        loaded: &mut Vec<Module>,
    ) -> Result<(), ModuleError> {
        if self.built_in.contains(name) || !known.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(file) = self.files.get(name) else {
            return Err(ModuleError::Unknown(name.to_owned()));
        };
        let content = self.read(file)?;
        for needed in needed(&content) {
            self.add(&needed, known, loaded)?;
        }
        loaded.push(Module { name: name.to_owned(), content });
        Ok(())
    }

    fn read(&self, file: &Path) -> Result<Vec<u8>, ModuleError> {
        if file.extension().is_some_and(|extension| extension == "xz") {
            return Ok(run(Command::new(&self.busybox).arg("xzcat").arg(file), UNPACK)?);
        }
        fs::read(file).map_err(|source| ModuleError::Io { path: file.to_owned(), source })
    }
}

/// The name of the module in a file, such as `kernel/drivers/block/virtio-blk.ko.xz`.
fn name(file: &Path) -> Option<String> {
    let name = file.file_name()?.to_str()?;
    let name = name.strip_suffix(".xz").unwrap_or(name).strip_suffix(".ko")?;
    Some(name.replace('-', "_"))
}

/// The names in a module's `depends=`, which is between zero bytes in its section `.modinfo`.
fn needed(content: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"depends=";
    let value = content.split(|&byte| byte == 0).find_map(|word| word.strip_prefix(KEY));
    let text = String::from_utf8_lossy(value.unwrap_or_default());
    let names = text.split(',').filter(|name| !name.is_empty());
    names.map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel with the module `a`, which needs `b-c` and one that is built in; `b_c` needs `d`.
    fn kernel() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let write = |path: &str, content: &[u8]| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        write("kernel/x/a.ko", b"ELF\0license=GPL\0depends=b-c,within\0name=a\0");
        write("kernel/x/y/b-c.ko", b"\0depends=d\0");
        write("kernel/d.ko", b"\0depends=\0");
        write("kernel/readme", b"no module");
        write("modules.builtin", b"kernel/x/within.ko\n");
        folder
    }

    fn order(names: &[&str]) -> Result<Vec<String>, ModuleError> {
        let folder = kernel();
        let modules = Modules::new(folder.path(), Path::new("/bin/false")).unwrap();
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        Ok(modules.load(&names)?.into_iter().map(|module| module.name).collect())
    }

    #[test]
    fn each_module_comes_once_and_behind_what_it_needs() {
        assert_eq!(order(&["a", "d"]).unwrap(), ["d", "b_c", "a"]);
        assert_eq!(order(&["b-c", "within"]).unwrap(), ["d", "b_c"]);
        assert_eq!(order(&[]).unwrap(), [""; 0]);
    }

    #[test]
    fn an_unknown_module_is_named() {
        let error = order(&["a", "elsewhere"]).unwrap_err();
        assert_eq!(error.to_string(), "the guest's kernel has no module \"elsewhere\"");
    }
}
