"use strict";
// The algorithm of the Node package koa-redis-session-sets on ioredis. It speaks with `turns.py` as `../worker.py` does,
// and keeps the sessions of `Original` in `../contenders.py`.

const { randomBytes } = require("node:crypto");
const { createInterface } = require("node:readline");
const { performance } = require("node:perf_hooks");
const { Redis } = require("ioredis");

const { url, prefix } = JSON.parse(process.argv[2]);
const client = new Redis(url);
const MAX_AGE = 28 * 86400 * 1000;
const REFERENCES = ["user_id", "ip"];

const ids = new Map();
const moved = new Set();
let visits = 0;

const key = (id) => `${prefix}:{${id}}`;
const referenceKey = (field, value) => `${prefix}:${field}:{${value}}`;

function values(n) {
  const host = Math.floor(n / 20) + (moved.has(n) ? 2 ** 20 : 0);
  return {
    user_id: Math.floor(n / 10),
    ip: `10.${host >> 16}.${(host >> 8) & 255}.${host & 255}`,
    visits: visits++,
  };
}

async function run(multi) {
  for (const [error] of await client.multi(multi).exec()) if (error) throw error;
}

function write(id, n) {
  const hmset = ["hmset", key(id), "id", id];
  const multi = [hmset, ["pexpire", key(id), MAX_AGE]];
  for (const [field, value] of Object.entries(values(n))) {
    hmset.push(field, value);
    if (REFERENCES.includes(field)) multi.push(["sadd", referenceKey(field, value), id]);
  }
  return run(multi);
}

const operations = {
  get: (n) => client.hgetall(key(ids.get(n))),
  set: (n) => write(ids.get(n), n),
  move(n) {
    if (!moved.delete(n)) moved.add(n);
    return write(ids.get(n), n);
  },
  touch: (n) => client.pexpire(key(ids.get(n)), MAX_AGE),
  async create(n) {
    const id = randomBytes(24).toString("base64url");
    await write(id, n);
    return id;
  },
  async delete(n) {
    const id = ids.get(n);
    const held = await client.hmget(key(id), ...REFERENCES);
    await run([["del", key(id)], ...REFERENCES.map((field, i) => ["srem", referenceKey(field, held[i]), id])]);
  },
};

let next = 0;
let filled = [];
let at = 0;

async function fill(count) {
  filled = Array.from({ length: count }, () => next++);
  ids.clear();
  moved.clear();
  for (let start = 0; start < count; start += 100) {
    const some = filled.slice(start, start + 100);
    const made = await Promise.all(some.map(operations.create));
    some.forEach((n, i) => ids.set(n, made[i]));
  }
  for (let i = count - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [filled[i], filled[j]] = [filled[j], filled[i]];
  }
  at = 0;
  return {};
}

function numbers(operation) {
  if (operation === "create") return () => next++;
  if (operation === "delete") {
    const left = filled;
    filled = [];
    return () => left.pop();
  }
  return () => filled[at++ % filled.length];
}

async function turn({ operation, tasks, seconds }) {
  const take = numbers(operation);
  const call = operations[operation];
  const times = [];
  const cpu = process.cpuUsage();
  const started = performance.now();
  const until = started + seconds * 1000;

  async function work() {
    let before = performance.now();
    for (let n = take(); n !== undefined; n = take()) {
      await call(n);
      const after = performance.now();
      times.push(after - before);
      if (after > until) return;
      before = after;
    }
  }

  await Promise.all(Array.from({ length: tasks }, work));
  const took = (performance.now() - started) / 1000;
  const { user, system } = process.cpuUsage(cpu);
  times.sort((a, b) => a - b);
  return {
    calls: times.length,
    seconds: took,
    cpu: (user + system) / 1e6,
    p50: times[Math.floor(times.length / 2)] / 1000,
    p99: times[Math.floor(times.length * 0.99)] / 1000,
  };
}

async function main() {
  const say = (reply) => process.stdout.write(`${JSON.stringify(reply)}\n`);
  const { version } = require("ioredis/package.json");
  say({
    name: "the original's algorithm, ioredis",
    lacks: "types; leaving the old set; TTLs of sets; refusing late writes; one atomic step to end a session",
    operations: Object.keys(operations),
    versions: { node: process.versions.node, ioredis: version },
  });
  for await (const line of createInterface({ input: process.stdin })) {
    const request = JSON.parse(line);
    say(await (request.operation === "fill" ? fill(request.count) : turn(request)));
  }
  client.disconnect();
}

main();
