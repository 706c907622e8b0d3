//! A part of the world's state, shared between the states in which it is the same.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

/// A value with its hash. A step changes one or two parts of the world: the others are neither
/// copied nor hashed again, and these once, when the step is over ([`Shared::seal`]).
#[derive(Clone, Debug)]
pub(crate) struct Shared<T> {
    hash: u64,
    changed: bool,
    value: Arc<T>,
}

impl<T: Hash + Clone> Shared<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { hash: hash_of(&value), changed: false, value: Arc::new(value) }
    }

    /// Changes the value.
    pub(crate) fn edit<R>(&mut self, change: impl FnOnce(&mut T) -> R) -> R {
        self.changed = true;
        change(Arc::make_mut(&mut self.value))
    }

    /// Ends a step.
    pub(crate) fn seal(&mut self) {
        if std::mem::take(&mut self.changed) {
            self.hash = hash_of(&*self.value);
        }
    }
}

/// The same in every run.
pub(crate) fn hash_of(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

impl<T> Deref for Shared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: PartialEq> PartialEq for Shared<T> {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.value, &other.value)
            || (self.hash == other.hash && self.value == other.value)
    }
}

impl<T: Eq> Eq for Shared<T> {}

impl<T> Hash for Shared<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}
