# Changes that are watched, a server and its client, and a thread.
cd /srv
cat >a.js <<'P'
const fs = require('fs'), http = require('http'), { Worker } = require('worker_threads');
fs.mkdirSync('w');
const watcher = fs.watch('w', (kind, file) => { console.log('watch', kind, file); watcher.close(); });
const server = http.createServer((question, answer) => answer.end('ok')).listen(8001, () =>
    http.get('http://127.0.0.1:8001', answer => answer.on('data', data => {
        console.log('http ' + data);
        server.close();
        fs.writeFileSync('w/x', '1');
    })));
new Worker('require("worker_threads").parentPort.postMessage(6 * 7)', { eval: true }).on('message', m => console.log('worker', m));
P
node a.js | sort
