//! Bugs that can be planted, to see that the tests notice them: `tests/planted` plants one after the other. Without the
//! feature `planted-bugs`, which nothing but that script asks for, there are none, and the compiler drops their places.

use std::sync::LazyLock;

/// Names the planted bug.
const VARIABLE: &str = "ADIT_PLANTED_BUG";

/// The bugs that a relay like this one is likely to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// A stream counts as whole once its end is known, whatever is missing before it.
    FinalSize,
    /// The tunnel that was heard of last is the newest of its slot.
    Epoch,
    /// An OPEN that comes again is served again.
    OpenTwice,
    /// A request is sent elsewhere when one of its OPENs came back, whatever became of the others.
    RetryAfterWrite,
    /// A tunnel that ends takes its client's others with it.
    DeleteByClient,
    /// What an agent says of an exchange is believed, whosever that is.
    Unstamped,
}

impl Bug {
    const ALL: [(&str, Bug); 6] = [
        ("final-size", Bug::FinalSize),
        ("epoch", Bug::Epoch),
        ("open-twice", Bug::OpenTwice),
        ("retry-after-write", Bug::RetryAfterWrite),
        ("delete-by-client", Bug::DeleteByClient),
        ("unstamped", Bug::Unstamped),
    ];

    /// Whether this one is planted.
    pub(crate) fn is_planted(self) -> bool {
        cfg!(feature = "planted-bugs") && *PLANTED == Some(self)
    }
}

static PLANTED: LazyLock<Option<Bug>> = LazyLock::new(|| {
    let name = std::env::var(VARIABLE).ok()?;
    Bug::ALL.iter().find(|(known, _)| *known == name).map(|(_, bug)| *bug)
});
