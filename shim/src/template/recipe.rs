//! What a template is made of.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Store;
use crate::config::{Config, Containers, Maxima, Size, Templates};

/// Everything that the saved machine depends on and that can be chosen; the host's CPU and kernel come on top.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The virtual machine monitor.
    pub vmm: PathBuf,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The guest image.
    pub image: PathBuf,
    /// The KVM device.
    pub kvm: PathBuf,
    /// Size of the machine.
    pub size: Size,
    /// The operator's kernel parameters.
    pub kernel_params: String,
}

impl Recipe {
    /// The recipe for the template of a pod with this configuration.
    pub(crate) fn of(config: &Config) -> Recipe {
        Recipe {
            vmm: config.vmm.clone(),
            kernel: config.kernel.clone(),
            image: config.image.clone(),
            kvm: config.kvm.clone(),
            size: config.size,
            kernel_params: config.kernel_params.clone(),
        }
    }
}

/// A template to be made, and where to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// What it is made of.
    pub recipe: Recipe,
    /// The file server of the pods that start from it.
    pub fs_server: PathBuf,
    /// The store's directory.
    pub directory: PathBuf,
    /// What all templates together may take on disk, bytes.
    pub limit: u64,
}

impl Order {
    /// The order for the template of a pod with this configuration.
    pub fn of(config: &Config) -> Order {
        Order {
            recipe: Recipe::of(config),
            fs_server: config.fs_server.clone(),
            directory: config.template_dir.clone(),
            limit: config.template_limit,
        }
    }

    /// The configuration of a pod that starts from the template.
    pub(crate) fn config(&self) -> Config {
        let Recipe { vmm, kernel, image, kvm, size, kernel_params } = self.recipe.clone();
        Config {
            vmm,
            fs_server: self.fs_server.clone(),
            kernel,
            image,
            kvm,
            size,
            maxima: Maxima::default(),
            annotations: false,
            kernel_params,
            templates: Templates::Auto,
            template_dir: self.directory.clone(),
            template_limit: self.limit,
            spoof_check: true,
            // Its guest runs nothing but what is ours.
            core_scheduling: false,
            containers: Containers::default(),
            log_level: log::LevelFilter::Info,
        }
    }

    /// The store.
    pub(crate) fn store(&self) -> Store {
        Store::new(self.directory.clone())
    }
}
