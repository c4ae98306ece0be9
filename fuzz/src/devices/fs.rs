//! The file system device between a guest and a file server, either of which may be hostile.

use bulkhead_vmm::devices::fs::FileSystem;
use bulkhead_vmm_protocol::MAX_FUSE_MESSAGE;
use bulkhead_vmm_protocol::loan::Loan;

use crate::guest::Guest;
use crate::host;
use crate::input::Input;

/// Requests, and answers that are sound, nonsense, or for another request; and files that are lent. The server only ever sees whole messages.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (socket, server) = host::packets();
    let mut server = Some(server);
    let mut tags = vec![0u64];
    let mut guest = Guest::new(Box::new(FileSystem::new("fuzz", socket).unwrap()));
    guest.run(&mut input, &mut |input| {
        let Some(end) = &server else { return };
        match input.below(9) {
            0 => server = None,
            1 => end.send(input.take(64)),
            2..=4 => {
                while let Some(request) = end.receive() {
                    let length = u32::from_le_bytes(*request.first_chunk().unwrap()) as usize;
                    assert!(length == request.len() && length <= MAX_FUSE_MESSAGE, "{length} bytes are said");
                    tags.push(u64::from_le_bytes(*request[8..].first_chunk().unwrap()));
                }
            }
            5 => {
                let loan = Loan { node: input.u8().into(), handle: input.u8().into() };
                end.lend(loan, &host::file(input.take(64)));
            }
            _ => {
                let tag = tags[usize::from(input.u8()) % tags.len()];
                let error = input.u8();
                let body = if error == 0 { vec![7; usize::from(input.u16())] } else { Vec::new() };
                let mut reply = (16 + body.len() as u32).to_le_bytes().to_vec();
                reply.extend((-i32::from(error)).to_le_bytes());
                reply.extend(tag.to_le_bytes());
                reply.extend(body);
                end.send(&reply);
            }
        }
    });
}
