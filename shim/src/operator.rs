//! What the operator asks a pod's shim for, by `bulkhead logs` and `bulkhead exec`: a service of its own on the shim's socket,
//! which is root's.
//!
//! Requests and answers are plain text. Whatever of an answer comes from the guest has been made fit for a terminal.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ttrpc::asynchronous::{Client, MethodHandler, Service, TtrpcContext};
use ttrpc::{Code, Request, Response};

use crate::error::chain;
use crate::pod::Pod;
use crate::task::shim::Shim;

const SERVICE: &str = "bulkhead.v1.Operator";

/// How long the shim may be busy with something else.
const BUSY_LIMIT: Duration = Duration::from_secs(5);

/// How long the guest may take.
const GUEST_LIMIT: Duration = Duration::from_secs(15);

/// The client waits a little longer than any of this may take.
const CALL_LIMIT: Duration = Duration::from_secs(25);

/// Most of an answer, bytes.
const MAX_ANSWER: u64 = 512 * 1024;

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// What is kept of the guest's console and of what the pod's processes said.
    Logs,
    /// A question to the guest.
    Ask,
}

impl Method {
    fn name(self) -> &'static str {
        match self {
            Self::Logs => "Logs",
            Self::Ask => "Ask",
        }
    }
}

/// An answer that did not come.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No runtime to wait with.
    #[error("can't wait for the shim")]
    Runtime(#[source] std::io::Error),
    /// The shim can't be reached, or says no.
    #[error("the shim at {address} has no answer")]
    Call {
        /// Where it serves.
        address: String,
        /// Why.
        #[source]
        source: ttrpc::Error,
    },
}

/// Asks the shim at an address.
///
/// # Errors
/// When it can't be reached, or refuses.
pub fn ask(address: &str, method: Method, question: &str) -> Result<String, AskError> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(AskError::Runtime)?;
    let mut request = Request::new();
    request.service = SERVICE.to_owned();
    request.method = method.name().to_owned();
    request.payload = question.as_bytes().to_vec();
    request.timeout_nano = i64::try_from(CALL_LIMIT.as_nanos()).unwrap_or(i64::MAX);
    let answer = runtime.block_on(async { Client::connect(address).await?.request(request).await });
    match answer {
        Ok(response) => Ok(for_terminal(&response.payload)),
        Err(source) => Err(AskError::Call { address: address.to_owned(), source }),
    }
}

/// The service.
pub(crate) fn service(shim: &Arc<Shim>) -> HashMap<String, Service> {
    let methods = [Method::Logs, Method::Ask].into_iter().map(|method| {
        let handler: Box<dyn MethodHandler + Send + Sync> = Box::new(Handler { method, shim: shim.clone() });
        (method.name().to_owned(), handler)
    });
    let service = Service { methods: methods.collect(), streams: HashMap::new() };
    HashMap::from([(SERVICE.to_owned(), service)])
}

struct Handler {
    method: Method,
    shim: Arc<Shim>,
}

#[async_trait]
impl MethodHandler for Handler {
    async fn handler(&self, _: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let mut response = Response::new();
        let status = match self.answer(&request.payload).await {
            Ok(answer) => {
                response.payload = answer.into_bytes();
                ttrpc::get_status(Code::OK, "")
            }
            Err((code, message)) => ttrpc::get_status(code, message),
        };
        response.set_status(status);
        Ok(response)
    }
}

impl Handler {
    async fn answer(&self, question: &[u8]) -> Result<String, (Code, String)> {
        let pod = self.pod().await?;
        match self.method {
            Method::Logs => Ok(logs(&pod).await),
            Method::Ask => {
                let question = String::from_utf8_lossy(question).into_owned();
                if question.contains('\n') || question.len() >= bulkhead_agent_protocol::forward::MAX_QUESTION
                {
                    return Err((
                        Code::INVALID_ARGUMENT,
                        "the question is no line of less than 256 bytes".into(),
                    ));
                }
                match tokio::time::timeout(GUEST_LIMIT, pod.ask(&question, MAX_ANSWER)).await {
                    Ok(Ok(answer)) => Ok(for_terminal(&answer)),
                    Ok(Err(error)) => Err((Code::UNAVAILABLE, chain(&error))),
                    Err(_) => Err((
                        Code::DEADLINE_EXCEEDED,
                        format!("the guest did not answer within {} s", GUEST_LIMIT.as_secs()),
                    )),
                }
            }
        }
    }

    async fn pod(&self) -> Result<Arc<Pod>, (Code, String)> {
        let Ok(slot) = tokio::time::timeout(BUSY_LIMIT, self.shim.slot.lock()).await else {
            let message = format!("a container is being made or removed, for {} s now", BUSY_LIMIT.as_secs());
            return Err((Code::UNAVAILABLE, message));
        };
        slot.pod.clone().ok_or_else(|| (Code::FAILED_PRECONDITION, "there is no pod yet, or no more".into()))
    }
}

async fn logs(pod: &Pod) -> String {
    let words = pod.last_words().await;
    match pod.death() {
        Some(death) => format!("{words}== end\n{}\n", death.reason),
        None => words,
    }
}

/// Text without anything that a terminal would take for an order.
fn for_terminal(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let is_plain = |character: char| !character.is_control() || matches!(character, '\n' | '\t');
    text.chars().map(|character| if is_plain(character) { character } else { '\u{fffd}' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_has_no_orders_for_a_terminal() {
        assert_eq!(
            for_terminal(b"a\tb\n\x1b[2J\x9b1m\xc2\x9b\r"),
            "a\tb\n\u{fffd}[2J\u{fffd}1m\u{fffd}\u{fffd}"
        );
    }
}
