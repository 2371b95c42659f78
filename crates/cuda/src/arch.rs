//! The architectures that kernels are compiled for.

use crate::{Error, Result};

/// A compile target. Cubins run on their own major generation only, and those with an `a` on their exact chip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arch {
    /// Ampere and Ada (compute capability 8.x).
    Sm80,
    /// Hopper (9.0).
    Sm90,
    /// Consumer Blackwell (12.0), with its FP4 instructions.
    Sm120a,
    /// GB10 (12.1), with its FP4 instructions: plain `sm_121` has none of them.
    Sm121a,
}

impl Arch {
    /// All targets.
    pub const ALL: [Self; 4] = [Self::Sm80, Self::Sm90, Self::Sm120a, Self::Sm121a];

    /// As NVRTC spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm90 => "sm_90",
            Self::Sm120a => "sm_120a",
            Self::Sm121a => "sm_121a",
        }
    }

    /// The target for a device of this compute capability; `None` where no kernel of ours runs.
    pub fn for_capability(major: u32, minor: u32) -> Option<Self> {
        match (major, minor) {
            (8, _) => Some(Self::Sm80),
            (9, 0) => Some(Self::Sm90),
            (12, 0) => Some(Self::Sm120a),
            (12, 1) => Some(Self::Sm121a),
            _ => None,
        }
    }

    /// Whether tensor cores multiply FP4 numbers with their block scales (`mxf4nvf4`).
    pub fn has_fp4(self) -> bool {
        matches!(self, Self::Sm120a | Self::Sm121a)
    }

    /// Whether a kernel may start while its predecessor ends (programmatic dependent launch).
    pub fn has_dependent_launch(self) -> bool {
        self != Self::Sm80
    }
}

impl std::str::FromStr for Arch {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|arch| arch.name() == name);
        found.ok_or_else(|| Error::UnknownArch { name: name.to_owned() })
    }
}

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_are_refused() {
        for arch in Arch::ALL {
            assert_eq!(arch.name().parse::<Arch>().unwrap(), arch);
        }
        let error = "sm_121".parse::<Arch>().unwrap_err().to_string();
        assert!(error.contains("`sm_121`") && error.contains("sm_121a"), "{error}");
    }

    #[test]
    fn devices_get_their_target() {
        assert_eq!(Arch::for_capability(8, 9), Some(Arch::Sm80));
        assert_eq!(Arch::for_capability(9, 0), Some(Arch::Sm90));
        assert_eq!(Arch::for_capability(12, 1), Some(Arch::Sm121a));
        // Data centre Blackwell would need kernels of its own.
        assert_eq!(Arch::for_capability(10, 0), None);
        assert_eq!(Arch::for_capability(7, 5), None);
        assert!(Arch::Sm120a.has_fp4() && Arch::Sm121a.has_fp4() && !Arch::Sm90.has_fp4());
        assert!(!Arch::Sm80.has_dependent_launch() && Arch::Sm90.has_dependent_launch());
    }
}
