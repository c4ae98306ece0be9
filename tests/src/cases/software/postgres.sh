# A cluster is made, filled, used by four clients, ended without a word, and recovers.
PATH=/usr/lib/postgresql/17/bin:$PATH
mkdir -p /srv/pg /var/run/postgresql
chown postgres:postgres /srv/pg /var/run/postgresql
chmod 700 /srv/pg
run() { setpriv --reuid postgres --regid postgres --clear-groups sh -c "cd /srv/pg; $1"; }
run 'initdb -A trust -D /srv/pg/d --locale C.UTF-8' | grep -c 'Success'
start() { run 'pg_ctl -w -t 60 -D d -l log -o "-c jit=off -c listen_addresses=" start' | tail -n 1; }
start
run 'pgbench -q -i -s 1 postgres 2>&1' | grep -c '^done'
run 'pgbench -c 4 -t 25 postgres 2>/dev/null' | grep -E 'actually|failed'
run 'psql -Atc "select count(*) from pgbench_history" postgres'
run 'psql -Atc "show dynamic_shared_memory_type" postgres'
run 'pg_ctl -w -D d -m immediate stop' | tail -n 1
start
run 'psql -Atc "select count(*), sum(delta) = (select sum(bbalance) from pgbench_branches) from pgbench_history" postgres'
run 'pg_ctl -w -D d -m fast stop' | tail -n 1
run 'tail -n 1 log' | grep -o 'database system is shut down'
