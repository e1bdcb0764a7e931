// For "make bench-others": clients of the npm package redis-semaphore take a permit and
// give it back, each over its own connection. The program reads lines "CLIENTS
// MILLISECONDS" and answers each with "PAIRS SECONDS".
const Redis = require('ioredis')
const { Semaphore } = require('redis-semaphore')
const { createInterface } = require('node:readline')

const [address, key, limit] = process.argv.slice(2)
const [host, port] = address.split(':')
const connections = []

async function client(connection, end) {
  let pairs = 0
  while (performance.now() < end) {
    const semaphore = new Semaphore(connection, key, Number(limit))
    await semaphore.acquire()
    await semaphore.release()
    pairs++
  }
  return pairs
}

async function main() {
  for await (const line of createInterface({ input: process.stdin })) {
    const [clients, milliseconds] = line.split(' ').map(Number)
    while (connections.length < clients) {
      const connection = new Redis({ host, port: Number(port) })
      await connection.ping()
      connections.push(connection)
    }
    const start = performance.now()
    const all = await Promise.all(connections.slice(0, clients).map(c => client(c, start + milliseconds)))
    console.log(all.reduce((a, b) => a + b), (performance.now() - start) / 1000)
  }
  process.exit(0)
}

main()
