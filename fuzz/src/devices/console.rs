//! The console and the entropy source.

use bulkhead_vmm::devices::VirtioDevice;
use bulkhead_vmm::devices::console::Console;
use bulkhead_vmm::devices::rng::Rng;

use crate::guest::Guest;
use crate::host;
use crate::input::Input;

/// The most bytes of output in a file.
const FILE_LIMIT: u64 = 4 << 20;

/// Output to a file, to somebody who reads now and then, or nowhere; or random numbers.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (file, (output, peer)) = (host::file(&[]), host::stream());
    let device: Box<dyn VirtioDevice> = match input.below(4) {
        0 => Box::new(Rng),
        1 => Box::new(Console::new(None).unwrap()),
        2 => Box::new(Console::new(Some(file.try_clone().unwrap().into())).unwrap()),
        _ => Box::new(Console::new(Some(output)).unwrap()),
    };
    Guest::new(device).run(&mut input, &mut |_| drop(peer.receive()));
    assert!(file.metadata().unwrap().len() <= FILE_LIMIT, "the console's file has no limit");
}
