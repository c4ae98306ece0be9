# InnoDB with direct I/O and native asynchronous I/O, Aria; killed, and what it had promised is there again.
echo 'mysql:x:101:101::/srv:/bin/sh' >>/etc/passwd
echo 'mysql:x:101:' >>/etc/group
mkdir -p /srv/m /run/mysqld
chown mysql:mysql /srv/m /run/mysqld
mariadb-install-db --force --user=mysql --datadir=/srv/m --skip-test-db --auth-root-authentication-method=normal >/tmp/log 2>&1
echo install $?
sql() { mariadb -S /run/mysqld/s -N -e "$1"; }
start() {
    mariadbd --no-defaults --user=mysql --datadir=/srv/m --socket=/run/mysqld/s --skip-networking \
        --innodb-flush-method=O_DIRECT --innodb-buffer-pool-size=32M >>/tmp/log 2>&1 &
    server=$!
    until sql 'select 1' >/dev/null 2>&1; do sleep 0.1; done
}
start
sql "create database d; use d;
create table t(i int primary key auto_increment, s varchar(200)) engine=innodb;
insert into t(s) select repeat('x', 200) from seq_1_to_3000; select count(*) from t;
create table a(i int) engine=aria; insert into a select seq from seq_1_to_500; select sum(i) from a;
check table t, a;"
kill -9 $server
wait $server 2>/dev/null
start
sql 'select count(*) from d.t'
sql shutdown
wait $server
echo ended $?
