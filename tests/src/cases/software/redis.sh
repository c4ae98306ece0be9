# A server that forks to save, appends to a log, and starts again from it.
export LC_ALL=C
cd /tmp
start() {
    redis-server --port 6379 --appendonly yes --save '' --daemonize yes --logfile /tmp/redis.log
    until redis-cli ping 2>/dev/null | grep -q PONG; do sleep 0.1; done
}
start
redis-cli set k v
redis-cli incr n
redis-benchmark -q -n 2000 -c 20 -t set,get,lpush >/dev/null 2>&1; echo bench $?
redis-cli bgsave >/dev/null
until grep -q 'Background saving terminated with success' redis.log; do sleep 0.1; done
redis-cli shutdown nosave
start
redis-cli get k
redis-cli shutdown
