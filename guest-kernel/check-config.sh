#!/usr/bin/env bash
# check-config.sh CONFIG FRAGMENT...: fail unless every option of the FRAGMENTs has in CONFIG, the configuration that came of them, the
# value that they ask for. An option that vanished or that lacks what it depends on would else be left out without a word.
set -euo pipefail

(($# >= 2)) || { echo "usage: $0 CONFIG FRAGMENT..." >&2; exit 2; }
awk -v config="$1" '
    function name(line) { return substr(line, 1, index(line, "=") - 1) }
    function value(line) { return substr(line, index(line, "=") + 1) }
    BEGIN {
        while ((read = (getline line < config)) > 0) if (line ~ /^CONFIG_/) found[name(line)] = value(line)
        if (read < 0) { print "kernel: can not read " config > "/dev/stderr"; exit failed = 2 }
    }
    /^CONFIG_[A-Za-z0-9_]+=./ {
        key = name($0); want = value($0); have = key in found ? found[key] : "n"
        if (key in seen) { print "kernel: " FILENAME ": " key " is there twice" > "/dev/stderr"; failed = 1 }
        seen[key] = 1
        if (have != want) { print "kernel: " FILENAME ": " key " is to be " want " and came out as " have > "/dev/stderr"; failed = 1 }
        next
    }
    !/^(#.*)?$/ { print "kernel: " FILENAME ": neither an option nor a comment: " $0 > "/dev/stderr"; failed = 1 }
    END { exit failed }' "${@:2}"
