//! A container of a pod.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use bulkhead_cri::proto::{self, ContainerState};
use bulkhead_cri::stream::Stream;

use super::{CALL_LIMIT, Node};
use crate::failure::{Explain, Outcome};
use crate::process::eventually;
use crate::{ensure, ensure_eq};

/// A container that was created.
pub struct Container<'a> {
    /// Where it runs.
    pub node: &'a Node,
    /// containerd's name for it.
    pub id: String,
    /// Its log.
    pub log: PathBuf,
}

/// A program that came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Its exit code, or 128 and the signal.
    pub code: i32,
    /// Why, in a word of the CRI's.
    pub reason: String,
    /// Everything that it wrote to its standard output.
    pub stdout: String,
    /// Everything that it wrote to its standard error.
    pub stderr: String,
}

impl Ended {
    /// The output, if the exit code is 0.
    ///
    /// # Errors
    /// Any other exit code.
    pub fn success(self) -> Outcome<String> {
        ensure!(self.code == 0, "{self:?}");
        Ok(self.stdout)
    }
}

/// The command that runs a shell script.
pub(crate) fn shell(script: &str) -> Vec<String> {
    ["/bin/sh", "-c", script].map(str::to_owned).into()
}

impl Container<'_> {
    /// Starts it.
    ///
    /// # Errors
    /// What containerd refuses.
    pub(crate) fn start(&self) -> Outcome {
        let request = proto::StartContainerRequest { container_id: self.id.clone(), ..Default::default() };
        self.node.client().start_container(&request).explain(|| "start a container".into()).map(drop)
    }

    /// Its state.
    ///
    /// # Errors
    /// When containerd does not know it.
    pub(crate) fn status(&self) -> Outcome<proto::ContainerStatus> {
        let request = proto::ContainerStatusRequest { container_id: self.id.clone(), ..Default::default() };
        let answer = self.node.client().container_status(&request).explain(|| "container status".into())?;
        answer.status.into_option().explain(|| "a container status without a status".into())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub(crate) fn wait(&self) -> Outcome<Ended> {
        let status = eventually("the container's end", CALL_LIMIT, || {
            let status = self.status()?;
            ensure_eq!(status.state.enum_value_or_default(), ContainerState::CONTAINER_EXITED, "state");
            Ok(status)
        })?;
        let (stdout, stderr) = self.output()?;
        Ok(Ended { code: status.exit_code, reason: status.reason, stdout, stderr })
    }

    /// What its log has of both streams so far.
    ///
    /// # Errors
    /// When the log is not in the CRI's format.
    pub(crate) fn output(&self) -> Outcome<(String, String)> {
        let text = fs::read_to_string(&self.log).explain(|| format!("read {}", self.log.display()))?;
        streams(&text)
    }

    /// Waits until its log has something.
    ///
    /// # Errors
    /// When it does not come.
    pub fn wait_for_output(&self, part: &str) -> Outcome<String> {
        eventually(&format!("{part:?} in the log"), CALL_LIMIT, || {
            let (stdout, stderr) = self.output()?;
            ensure!(stdout.contains(part), "stdout {stdout:?}, stderr {stderr:?}");
            Ok(stdout)
        })
    }

    /// Runs a shell script in it.
    ///
    /// # Errors
    /// What containerd refuses.
    pub(crate) fn exec(&self, script: &str) -> Outcome<Ended> {
        self.exec_command(&shell(script), Duration::ZERO)
    }

    /// Runs a program in it, for at most `limit` unless that is zero.
    ///
    /// # Errors
    /// What containerd refuses, and an end that does not come within the limit.
    pub(crate) fn exec_command(&self, command: &[String], limit: Duration) -> Outcome<Ended> {
        let request = proto::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.to_vec(),
            timeout: limit.as_secs() as i64,
            ..Default::default()
        };
        let answer = self.node.client().exec_sync(&request).explain(|| "exec".into())?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Ended {
            code: answer.exit_code,
            reason: String::new(),
            stdout: text(&answer.stdout),
            stderr: text(&answer.stderr),
        })
    }

    /// Runs a program in it with streams, or a terminal.
    ///
    /// # Errors
    /// What containerd or its streaming server refuses.
    pub(crate) fn exec_stream(&self, command: &[String], tty: bool) -> Outcome<Stream> {
        let request = proto::ExecRequest {
            container_id: self.id.clone(),
            cmd: command.to_vec(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
            ..Default::default()
        };
        let url = self.node.client().exec(&request).explain(|| "exec".into())?.url;
        Stream::open(&url, CALL_LIMIT).explain(|| "exec".into())
    }

    /// Its own streams, or its terminal.
    ///
    /// # Errors
    /// What containerd or its streaming server refuses.
    pub(crate) fn attach(&self, tty: bool) -> Outcome<Stream> {
        let request = proto::AttachRequest {
            container_id: self.id.clone(),
            stdin: true,
            tty,
            stdout: true,
            stderr: !tty,
            ..Default::default()
        };
        let url = self.node.client().attach(&request).explain(|| "attach".into())?.url;
        Stream::open(&url, CALL_LIMIT).explain(|| "attach".into())
    }

    /// Ends it: with its stop signal first, and SIGKILL after `grace`.
    ///
    /// # Errors
    /// What containerd refuses.
    pub(crate) fn stop(&self, grace: Duration) -> Outcome {
        let request = proto::StopContainerRequest {
            container_id: self.id.clone(),
            timeout: grace.as_secs() as i64,
            ..Default::default()
        };
        self.node.client().stop_container(&request).explain(|| "stop a container".into()).map(drop)
    }

    /// Removes it.
    ///
    /// # Errors
    /// What containerd refuses.
    pub(crate) fn remove(self) -> Outcome {
        let request = proto::RemoveContainerRequest { container_id: self.id, ..Default::default() };
        self.node.client().remove_container(&request).explain(|| "remove a container".into()).map(drop)
    }
}

/// The streams of a log in the CRI's format: lines of a time, a stream, F or P (the line goes on), and the text.
fn streams(log: &str) -> Outcome<(String, String)> {
    let (mut stdout, mut stderr) = (String::new(), String::new());
    for line in log.lines() {
        let mut fields = line.splitn(4, ' ');
        let (Some(_), Some(stream), Some(kind), Some(text)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            crate::fail!("no line of a CRI log: {line:?}")
        };
        let into = if stream == "stderr" { &mut stderr } else { &mut stdout };
        into.push_str(text);
        if kind == "F" {
            into.push('\n');
        }
    }
    Ok((stdout, stderr))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_come_apart() {
        let log = "T stdout F one\nT stderr F bad\nT stdout P two\nT stdout F  and on\n";
        assert_eq!(streams(log).unwrap(), ("one\ntwo and on\n".to_owned(), "bad\n".to_owned()));
        assert!(streams("nonsense\n").is_err());
    }
}
