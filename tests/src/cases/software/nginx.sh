# Files by sendfile and threads, a proxy over a unix socket, a new configuration while it runs.
mkdir -p /tmp/n/html
cd /tmp/n
head -c 20000000 /dev/urandom >html/big
echo hello >html/index.html
cat >n.conf <<C
user root;
worker_processes 2;
pid /tmp/n/pid;
error_log /tmp/n/log;
events { worker_connections 256; }
http {
    access_log off;
    client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
    sendfile on;
    tcp_nopush on;
    aio threads;
    open_file_cache max=10;
    server {
        listen 127.0.0.1:8080;
        listen unix:/tmp/n/sock;
        root /tmp/n/html;
        location /proxied/ { proxy_pass http://unix:/tmp/n/sock:/; }
    }
}
C
nginx -p /tmp/n -c n.conf
until curl -s http://127.0.0.1:8080/; do sleep 0.1; done
curl -s http://127.0.0.1:8080/big | cmp - html/big && echo same
curl -s http://127.0.0.1:8080/proxied/big | cmp - html/big && echo proxied
curl -s -r 100-199 http://127.0.0.1:8080/big | wc -c
curl -s -Z $(seq -f 'http://127.0.0.1:8080/big?%g -o /dev/null' 10) && echo together
nginx -p /tmp/n -c n.conf -s reload 2>/dev/null
curl -s --unix-socket sock http://any/
nginx -p /tmp/n -c n.conf -s quit 2>/dev/null
while [ -e pid ]; do sleep 0.1; done
