// A client of tiered-kvstore with nothing but the proto files: puts, matches, gets, compares bytes.
//
//   node client.js PROTO_FOLDER COORDINATOR ORDERS
//
// ORDERS is a JSON file: {"spec": canonical spec JSON, "block_bytes": n, "tokens": tokens of a block,
// "put": [tokens of a prompt], "get": [tokens of a prompt that somebody else put]}. What it gets is written to
// ORDERS.got, what it did to stdout as JSON. docs/FORMAT.md and docs/PROTOCOL.md say what the bytes mean.
"use strict";

const crypto = require("crypto");
const fs = require("fs");
const path = require("path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const EXACT = 3, FOUND = 1, COMMITTED = 3, HELD = 4, RAW_CODEC = 0, ENTRY_BYTES = 40;
const MESSAGE_BYTES = 1 << 20;
const BOUND_MS = 10000;

const sha = (...parts) => crypto.createHash("sha256").update(Buffer.concat(parts)).digest().subarray(0, 16);

/** FORMAT.md, "Keys": a block's key hashes its parent's key and its tokens; here without extras. */
function chain(spec, blockTokens, tokens) {
  const root = sha(Buffer.from("kvstore/1\0"), Buffer.from(spec));
  const keys = [];
  let parent = root;
  for (let at = 0; at + blockTokens <= tokens.length; at += blockTokens) {
    const block = Buffer.alloc(4 * blockTokens);
    tokens.slice(at, at + blockTokens).forEach((token, index) => block.writeUInt32LE(token, 4 * index));
    parent = sha(parent, block, Buffer.alloc(4));
    keys.push(parent);
  }
  return { root, keys };
}

/** Bytes that depend on the key alone, so that any reader can check them. */
function bytesOf(key, length) {
  const out = Buffer.alloc(length);
  for (let at = 0, n = 0; at < length; at += 32, n += 1) {
    const counter = Buffer.alloc(4);
    counter.writeUInt32LE(n);
    crypto.createHash("sha256").update(Buffer.concat([key, counter])).digest().copy(out, at);
  }
  return out;
}

function load(folder) {
  const files = ["coordinator", "worker"].map((name) => path.join("kvstore", "wire", `${name}.proto`));
  const options = { includeDirs: [folder], keepCase: true, longs: String, enums: Number, defaults: true };
  return grpc.loadPackageDefinition(loader.loadSync(files, options)).tiered_kvstore.v1;
}

const unary = (client, method, request) =>
  new Promise((resolve, reject) =>
    client[method](request, { deadline: Date.now() + BOUND_MS }, (error, reply) => (error ? reject(error) : resolve(reply))));

function put(worker, spec, shard, blockBytes, { root, keys }) {
  const blocks = keys.map((key, depth) => ({
    shard, key, parent: depth ? keys[depth - 1] : root, group: keys[depth - (depth % 32)], depth,
    computed_on: EXACT, raw_bytes: blockBytes,
  }));
  return new Promise((resolve, reject) => {
    const call = worker.Put({ deadline: Date.now() + BOUND_MS }, (error, reply) => (error ? reject(error) : resolve(reply)));
    call.write({ h: { spec_json: spec, blocks } });
    const data = Buffer.concat(keys.map((key) => bytesOf(key, blockBytes)));
    for (let at = 0; at < data.length; at += MESSAGE_BYTES) call.write({ data: data.subarray(at, at + MESSAGE_BYTES) });
    call.end();
  });
}

/** A Get stream: chunks of each block come in order, with their table entries; here only raw ones are understood. */
function get(worker, root, shard, keys) {
  return new Promise((resolve, reject) => {
    let infos = null;
    const parts = keys.map(() => []);
    const call = worker.Get({ root, blocks: [{ shard, keys: Buffer.concat(keys) }], least: EXACT },
      { deadline: Date.now() + BOUND_MS });
    call.on("data", (frame) => {
      if (infos === null) infos = frame.h.blocks;
      let at = 0;
      for (const part of frame.h ? frame.h.parts : []) {
        for (let entry = 0; entry < part.table.length; entry += ENTRY_BYTES) {
          const codec = part.table.readUInt16LE(entry + 8), stored = part.table.readUInt32LE(entry + 24);
          if (codec !== RAW_CODEC) return call.destroy(new Error(`codec ${codec} is not understood here`));
          parts[part.block].push(frame.data.subarray(at, at + stored));
          at += stored;
        }
      }
    });
    call.on("error", reject);
    call.on("end", () => resolve(infos.map((info, index) => (info.state === FOUND ? Buffer.concat(parts[index]) : null))));
  });
}

async function main() {
  const [folder, coordinatorAddress, ordersFile] = process.argv.slice(2);
  const orders = JSON.parse(fs.readFileSync(ordersFile));
  const { Coordinator, Worker } = load(folder);
  const coordinator = new Coordinator(coordinatorAddress, grpc.credentials.createInsecure());
  const members = (await unary(coordinator, "Members", {})).members.filter((member) => member.address);
  const worker = new Worker(members[0].address, grpc.credentials.createInsecure());

  const mine = chain(orders.spec, orders.tokens, orders.put);
  const done = await put(worker, orders.spec, orders.shard, orders.block_bytes, mine);
  const stored = done.states.filter((state) => state === COMMITTED || state === HELD).length;

  const match = (prefix, after) => unary(coordinator, "Match",
    { root: prefix.root, keys: Buffer.concat(prefix.keys), shards: [orders.shard], least: EXACT, after, wait_ms: 100 });
  let found = 0;
  for (let turn = 0; turn < 50 && found < mine.keys.length; turn += 1) found = (await match(mine, [done.token])).blocks;
  const back = await get(worker, mine.root, orders.shard, mine.keys);
  const same = back.filter((raw, depth) => raw !== null && raw.equals(bytesOf(mine.keys[depth], orders.block_bytes))).length;

  const theirs = chain(orders.spec, orders.tokens, orders.get);
  const matched = (await match(theirs, [])).blocks;
  const got = await get(worker, theirs.root, orders.shard, theirs.keys.slice(0, matched));
  fs.writeFileSync(`${ordersFile}.got`, Buffer.concat(got));

  console.log(JSON.stringify({ stored, found, same, matched, keys: mine.keys.map((key) => key.toString("hex")) }));
  coordinator.close();
  worker.close();
}

main().catch((error) => {
  console.error(error.message);
  process.exit(1);
});
