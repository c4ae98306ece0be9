//! Volumes that several look at: containers of a pod, and the node itself. Each answer is compared with runc's.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use super::volumes::{tmpfs, volume};
use crate::cases::Environment;
use crate::cri::{Container, Handler, Pod};
use crate::ensure_eq;
use crate::failure::{Explain, Outcome};

/// Asks pods of runc and of the handler under test, and expects the same answers.
fn compare(
    environment: &Environment,
    mut ask: impl FnMut(&Pod<'_>) -> Outcome<Vec<String>>,
) -> Outcome<Vec<String>> {
    let right = ask(&environment.shared_pod(Handler::Runc)?)?;
    let answers = ask(&environment.shared_pod(environment.handler())?)?;
    ensure_eq!(answers, right, "answers, and runc's");
    Ok(right)
}

fn end(container: Container<'_>) -> Outcome {
    container.stop(Duration::ZERO)?;
    container.remove()
}

fn write(path: &Path, text: &str) -> Outcome {
    fs::write(path, text).explain(|| format!("write {}", path.display()))
}

/// Makes a directory of the node for `work`, and removes it.
fn with_directory<T>(
    environment: &Environment,
    name: &str,
    work: impl FnOnce(&Path) -> Outcome<T>,
) -> Outcome<T> {
    let directory = environment.node()?.directory(name)?;
    let result = work(&directory);
    let _ = fs::remove_dir_all(&directory);
    result
}

/// A directory in two containers of a pod, in one of them twice, is one: its FIFOs, sockets, locks and files.
pub(crate) fn of_a_pod(environment: &mut Environment) -> Outcome<String> {
    with_directory(environment, "of-a-pod", |directory| {
        let answers = compare(environment, |pod| {
            let shared = directory.join(&pod.known.id);
            fs::create_dir(&shared).explain(|| "make the volume".into())?;
            let sleep = "sleep 100000";
            let one = pod.start("one", sleep, |config| {
                config.mounts = vec![volume(&shared, "/a"), volume(&shared, "/again")];
            })?;
            let two = pod.start("two", sleep, |config| config.mounts = vec![volume(&shared, "/b")])?;
            let detached = |script: &str| format!("({script}) >/dev/null 2>&1 </dev/null &");
            let mut answers = Vec::new();
            one.exec(&format!("mkfifo /a/p; {}", detached("echo through >/a/p")))?;
            answers.push(two.exec("timeout 5 cat /b/p")?.stdout);
            one.exec(&format!("{} sleep 0.3", detached("flock /again/l sleep 5")))?;
            for container in [&one, &two] {
                let try_lock = "cd /a 2>/dev/null || cd /b; flock -n l true && echo free || echo busy";
                answers.push(container.exec(try_lock)?.stdout);
            }
            one.exec("ln -s /a/log /dev/log; syslogd -O /a/messages; sleep 0.3; chmod 666 /a/log")?;
            let logged = "ln -s /b/log /dev/log; logger over; sleep 0.5; grep -o over /b/messages";
            answers.push(two.exec(logged)?.stdout);
            let same = "[ $(stat -c %d:%i /a/p) = $(stat -c %d:%i /again/p) ] && echo one file; \
                        echo 1 >/a/n; echo 2 >>/again/n; ln /a/n /a/m; stat -c %h /again/n; cat /again/m";
            answers.push(one.exec(same)?.stdout);
            answers.push(two.exec("cat /b/n; mv /b/n /b/o; echo 3 >>/b/o")?.stdout);
            // What a container knows of a name it may believe for a second.
            answers.push(one.exec("sleep 1.1; cat /a/o; ls /a/n 2>&1 | grep -c 'No such'")?.stdout);
            end(one)?;
            end(two)?;
            Ok(answers)
        })?;
        Ok(answers.concat().replace('\n', " "))
    })
}

/// What the node changes while a container looks: links swapped as those of ConfigMaps, files replaced, grown, removed.
pub(crate) fn changed_by_the_node(environment: &mut Environment) -> Outcome<String> {
    with_directory(environment, "changed", |directory| {
        let answers = compare(environment, |pod| {
            let map = directory.join(&pod.known.id);
            let version = |name: &str, text: &str| -> Outcome {
                fs::create_dir_all(map.join(name)).explain(|| "make a version".into())?;
                write(&map.join(name).join("key"), text)?;
                symlink(name, map.join("..new")).explain(|| "make a link".into())?;
                fs::rename(map.join("..new"), map.join("..data")).explain(|| "swap the link".into())
            };
            version("..1", "first\n")?;
            symlink("..data/key", map.join("key")).explain(|| "make a link".into())?;
            write(&map.join("single"), "one\n")?;
            write(&map.join("log"), "line\n")?;
            let container = pod.start("looks", "sleep 100000", |config| {
                config.mounts = vec![
                    volume(&map, "/map"),
                    volume(&map.join("single"), "/single"),
                    volume(&map.join("..1/key"), "/key"),
                ];
            })?;
            let look = "cat /map/key /single /key /map/log; readlink /map/..data; ls /map";
            let mut answers = vec![container.exec(look)?.stdout];
            version("..2", "second\n")?;
            fs::remove_dir_all(map.join("..1")).explain(|| "remove a version".into())?;
            write(&map.join("single"), "another\n")?;
            write(&map.join("log"), "line\nand line\n")?;
            write(&map.join("fresh"), "")?;
            answers.push(container.exec(&format!("sleep 1.1; {look}"))?.stdout);
            end(container)?;
            Ok(answers)
        })?;
        Ok(answers[1].replace('\n', " "))
    })
}

/// How large a volume is and how much of it is in use, which mounts there are and what may be written to.
pub(crate) fn room(environment: &mut Environment) -> Outcome<String> {
    with_directory(environment, "room", |directory| {
        let [memory, over, below] = ["memory", "over", "over/below"].map(|name| directory.join(name));
        for path in [&memory, &over, &below] {
            fs::create_dir(path).explain(|| format!("make {}", path.display()))?;
        }
        tmpfs(&memory)?;
        tmpfs(&below)?;
        let answers = compare(environment, |pod| {
            let container = pod.start("room", "sleep 100000", |config| {
                config.mounts = vec![volume(&memory, "/memory"), volume(&over, "/over")];
                config.mounts.push(bulkhead_cri::proto::Mount { readonly: true, ..volume(&over, "/read") });
            })?;
            let used = "df -k /memory /over/below | awk 'NR > 1 { print $2, $3, $4, $6 }'; \
                        stat -f -c '%s %b %c %l' /memory /over/below; \
                        [ $(stat -f -c %b /over) = $(stat -f -c %b /memory) ] || echo another";
            let answers = vec![
                container.exec(used)?.stdout,
                container.exec(&format!("head -c 102400 /dev/zero >/memory/f; sync; {used}"))?.stdout,
                container.exec("head -c 2000000 /dev/zero >/memory/g; rm /memory/f /memory/g")?.stderr,
                container
                    .exec(
                        "awk '$2 ~ /^.(memory|over|read)/ { print $2, substr($4, 1, 2) }' /proc/mounts; \
                       for d in / /memory /over /over/below; do mountpoint $d; done; \
                       stat -c %d /memory /over /over/below / | sort | uniq | wc -l; \
                       mkdir /over/d; echo x >/over/below/deep; find /over -xdev | sort; rm -r /over/d /over/below/deep",
                    )?
                    .stdout,
            ];
            end(container)?;
            Ok(answers)
        });
        for path in [&memory, &below] {
            let _ = nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH);
        }
        Ok(answers?.concat().replace('\n', " "))
    })
}

/// As many files as a tree of dependencies has.
pub(crate) fn many_files(environment: &mut Environment) -> Outcome<String> {
    const DIRECTORIES: usize = 150;
    const FILES: usize = 1000;
    with_directory(environment, "many", |directory| {
        for number in 0..DIRECTORIES {
            let path = directory.join(number.to_string());
            fs::create_dir(&path).explain(|| "make a directory".into())?;
            for number in 0..FILES {
                let file = path.join(number.to_string());
                fs::File::create(&file).explain(|| format!("make {}", file.display()))?;
            }
        }
        let pod = environment.shared_pod(environment.handler())?;
        let container =
            pod.start("many", "sleep 100000", |config| config.mounts = vec![volume(directory, "/many")])?;
        let find = ["sh", "-c", "find /many -type f -size 0 | wc -l"];
        let command: Vec<String> = find.iter().map(ToString::to_string).collect();
        let found = container.exec_command(&command, Duration::from_secs(120))?.success()?;
        ensure_eq!(found, format!("{}\n", DIRECTORIES * FILES), "files found");
        end(container)?;
        Ok(format!("{} files", DIRECTORIES * FILES))
    })
}
