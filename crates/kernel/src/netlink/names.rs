//! ifindex ⇄ name of one network namespace.

use std::collections::HashMap;

use twill_core::net::LinkName;

/// Both directions, kept by link messages.
#[derive(Debug, Default, Clone)]
pub(crate) struct Names {
    by_index: HashMap<u32, LinkName>,
    by_name: HashMap<LinkName, u32>,
}

impl Names {
    pub(crate) fn insert(&mut self, index: u32, name: LinkName) {
        if let Some(old) = self.by_index.insert(index, name) {
            self.by_name.remove(&old);
        }
        self.by_name.insert(name, index);
    }

    pub(crate) fn extend(&mut self, found: Option<(u32, LinkName)>) {
        found.into_iter().for_each(|(index, name)| self.insert(index, name));
    }

    pub(crate) fn remove(&mut self, index: u32) -> Option<LinkName> {
        let name = self.by_index.remove(&index)?;
        // The name may already belong to a new device.
        if self.by_name.get(&name) == Some(&index) {
            self.by_name.remove(&name);
        }
        Some(name)
    }

    pub(crate) fn name(&self, index: u32) -> Option<LinkName> {
        self.by_index.get(&index).copied()
    }

    pub(crate) fn index(&self, name: LinkName) -> Option<u32> {
        self.by_name.get(&name).copied()
    }

    pub(crate) fn clear(&mut self) {
        self.by_index.clear();
        self.by_name.clear();
    }
}
