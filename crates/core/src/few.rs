//! A list for what there is one of.

use serde::{Deserialize, Serialize};

/// A list that nearly always has one element and then costs no allocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    from = "Vec<T>",
    into = "Vec<T>",
    bound(serialize = "T: Clone + Serialize", deserialize = "T: Deserialize<'de>")
)]
pub enum Few<T> {
    /// The usual case.
    One(T),
    /// None, or two and more.
    Many(Vec<T>),
}

impl<T> Few<T> {
    /// No element.
    pub const fn none() -> Self {
        Few::Many(Vec::new())
    }

    /// The elements.
    pub fn as_slice(&self) -> &[T] {
        match self {
            Few::One(one) => std::slice::from_ref(one),
            Few::Many(many) => many,
        }
    }

    /// The first element.
    pub fn first(&self) -> Option<&T> {
        self.as_slice().first()
    }
}

impl<T> From<Vec<T>> for Few<T> {
    fn from(mut many: Vec<T>) -> Self {
        if many.len() == 1
            && let Some(one) = many.pop()
        {
            Few::One(one)
        } else {
            Few::Many(many)
        }
    }
}

impl<T> From<Few<T>> for Vec<T> {
    fn from(few: Few<T>) -> Self {
        match few {
            Few::One(one) => vec![one],
            Few::Many(many) => many,
        }
    }
}
